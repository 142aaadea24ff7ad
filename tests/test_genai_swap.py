"""Adapters swapped while a session is open, in onnxruntime-genai: the same numbers as in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export.blockdiag import Array
from tests.onnx_runs import IDS, LOGITS, in_torch, runner

og = pytest.importorskip("onnxruntime_genai")
Get = Callable[..., Path]
STEPS = 6


def generate(model: Any, adapters: Any = None, name: str | None = None) -> tuple[list[int], list[Array]]:
    """Greedy tokens after IDS and the logits of each step."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=IDS.shape[1] + STEPS, do_sample=False)
    generator = og.Generator(model, params)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(IDS[0].tolist())
    logits = []
    for _ in range(STEPS):
        logits.append(np.array(generator.get_logits())[0, -1])
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[IDS.shape[1] :]], logits


def wanted(model: Path, adapter: Path | None, tokens: list[int]) -> Array:
    """The logits of torch for the same text, at the positions that were generated."""
    ids = np.concatenate([IDS[0], np.array(tokens, np.int64)])[None]
    return in_torch(model, adapter, ids)[0, IDS.shape[1] - 1 : -1]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_base_then_two_adapters_then_base(
    architecture: str, exported: Get, tiny_model: Get, tiny_adapter: Get, other_adapter: Get
) -> None:
    folder = exported(architecture)
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name in ("a", "b"):  # 4 and 8 blocks; b leaves the first layer alone
        adapters.load(str(folder / "adapters" / f"{name}.onnx_adapter"), name)
    base_tokens, base = generate(model)
    texts = {}
    for name, source in (("a", tiny_adapter(architecture)), ("b", other_adapter(architecture))):
        texts[name], logits = generate(model, adapters, name)
        reference = wanted(tiny_model(architecture), source, texts[name])
        np.testing.assert_allclose(np.stack(logits), reference, rtol=0, atol=LOGITS)
        assert np.abs(reference - wanted(tiny_model(architecture), None, texts[name])).max() > 1000 * LOGITS
    assert len({tuple(base_tokens), *map(tuple, texts.values())}) == 3
    again_tokens, again = generate(model)
    assert again_tokens == base_tokens
    assert np.array_equal(np.stack(again), np.stack(base))  # nothing of an adapter stays behind
    np.testing.assert_allclose(np.stack(base), wanted(tiny_model(architecture), None, base_tokens), rtol=0, atol=LOGITS)


def test_int4_base_is_the_base_in_both_runtimes(exported: Get) -> None:
    folder = exported("llama", "int4")
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    adapters.load(str(folder / "adapters/a.onnx_adapter"), "a")
    run = runner(folder / "model.onnx")
    for name in (None, "a"):
        _, logits = generate(model, adapters, name)
        alone = run(folder / f"adapters/{name}.onnx_adapter" if name else None)[0, -1]
        np.testing.assert_array_equal(logits[0], alone)  # the same kernels on the same inputs


def test_an_adapter_of_another_export_is_refused(exported: Get) -> None:
    model = og.Model(str(exported("llama")))
    adapters = og.Adapters(model)
    adapters.load(str(exported("phi3") / "adapters/a.onnx_adapter"), "foreign")
    with pytest.raises(Exception, match=r"Invalid input name: model\.layers\.\d\.\w+\.\w+_proj\.diablo_blocks"):
        generate(model, adapters, "foreign")
