"""An export for the web in onnxruntime-node, in onnxruntime-web under node, and in a browser: the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from diablo_export.converters.export import export
from tests.onnx_runs import LOGITS
from tests.runtimes import tools
from tests.runtimes.reference import ADAPTERS, PROMPT, STEPS, wanted

pytestmark = pytest.mark.runtimes
Get = Callable[..., Path]
WEB = ("onnxruntime-web under node", "onnxruntime-web in Chromium")


def measure(runtime: str, folder: Path, **job: Any) -> Any:
    if runtime.endswith("Chromium"):
        found = tools.browser(folder, **job)
        assert not found["errors"]
        return found["found"]
    return tools.node("node.mjs", runtime.split()[0], folder, json.dumps(job))


def in_float(folder: Path, to: Path) -> Path:
    """A copy whose int4 layers take their inputs in float32: the web's always do, whatever accuracy_level says."""
    shutil.copytree(folder, to)
    model = onnx.load(to / "model.onnx", load_external_data=False)
    levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert levels
    for level in levels:
        level.i = 1
    onnx.save(model, to / "model.onnx")
    return to


@pytest.mark.parametrize(
    ("runtime", "architecture", "quantize"),
    [
        *[(runtime, "llama", "none") for runtime in ("onnxruntime-node", *WEB)],
        *[(runtime, "llama", "int4") for runtime in ("onnxruntime-node", WEB[1])],
        *[(runtime, "bert", "none") for runtime in ("onnxruntime-node", WEB[1])],
        *[("onnxruntime-node", architecture, "none") for architecture in ("lfm2", "qwen3_5")],
        pytest.param(WEB[1], "gpt2", "none", marks=pytest.mark.slow),  # with position_ids, from the other exporter
    ],
)
def test_same_numbers(runtime: str, architecture: str, quantize: str, exported: Get, tmp_path: Path) -> None:
    tools.npm()
    steps = 0 if architecture == "bert" else STEPS
    swap, web = exported(architecture, quantize), exported(architecture, quantize, "web")
    found = measure(runtime, web, adapters=ADAPTERS, ids=PROMPT, steps=steps)
    if quantize == "int4" and runtime in WEB:
        swap = in_float(swap, tmp_path / "float")
    logits = [np.array(one["logits"], np.float32) for one in found]
    for name, values, one in zip(ADAPTERS, logits, found, strict=True):
        expected = wanted(swap, name, steps)
        np.testing.assert_allclose(values, expected.logits, rtol=0, atol=LOGITS)
        assert one["tokens"] == expected.tokens
    np.testing.assert_array_equal(logits[0], logits[-1])  # nothing of an adapter stays behind
    for values in logits[1:3]:
        assert np.abs(logits[0] - values).max() > 1000 * LOGITS


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"block_dtype": "fp16"}, {"block_dtype": "int8"}], ids=str)
def test_fewer_bits_in_a_browser(
    options: dict[str, str], tiny_model: Get, tiny_adapter: Get, exported: Get, tmp_path: Path
) -> None:
    tools.npm()
    swap = tmp_path / "swap" if options.get("block_dtype") else exported("llama")
    for folder, for_ in ((swap, "ort"), (tmp_path / "web", "web")):
        if not folder.exists():
            export(tiny_model("llama"), {"a": tiny_adapter("llama")}, folder, for_=for_, **options)
    found = measure(WEB[1], tmp_path / "web", adapters=["base", "a"], ids=PROMPT, steps=0)
    # a graph in fp16 rounds weights, blocks and activations to 2^-11 of themselves: logits near 10, two layers
    error = 0.1 if "precision" in options else LOGITS
    for name, one in zip(("base", "a"), found, strict=True):
        np.testing.assert_allclose(one["logits"], wanted(swap, name, 0).logits, rtol=0, atol=error)


def test_an_adapter_for_another_base_is_refused(exported: Get, tmp_path: Path) -> None:
    tools.npm()
    folder = Path(shutil.copytree(exported("llama", for_="web"), tmp_path / "web"))
    file = folder / "adapters/b.safetensors"
    save_file(load_file(file), file, {"diablo.base": "0" * 64})
    with pytest.raises(AssertionError, match=r"the adapter is for the base 0{64}, the model is [0-9a-f]{64}"):
        measure("onnxruntime-node", folder, adapters=["base"], ids=PROMPT, steps=0)


@pytest.mark.parametrize("runtime", ["onnxruntime-node", WEB[1]])
def test_a_real_model(runtime: str, real_exports: tuple[Path, Path]) -> None:
    tools.npm()
    swap, web = real_exports
    prompt = [403, 407, 261, 378, 432]
    found = measure(runtime, web, adapters=ADAPTERS, ids=prompt, steps=STEPS)
    for name, one in zip(ADAPTERS, found, strict=True):
        expected = wanted(swap, name, STEPS, prompt)
        np.testing.assert_allclose(one["logits"], expected.logits, rtol=0, atol=LOGITS)
        assert one["tokens"] == expected.tokens


def test_another_folder_is_refused_with_a_reason(exported: Get) -> None:
    tools.npm()
    with pytest.raises(AssertionError, match="not an export for the web; make it with: diablo-export export --for web"):
        measure("onnxruntime-node", exported("llama"), adapters=["base"], ids=PROMPT, steps=0)
