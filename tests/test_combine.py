"""Sums of adapters: on a graph of one branch, and on an exported decoder against the merged sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.block_storage import from_int8, to_int8
from diablo_export.blockdiag import Array, apply
from diablo_export.errors import InputError
from diablo_export.swap import SwapAdapter
from tests.branch_graphs import OTHER_BASE, adapter_file, graph_file, random_blocks
from tests.onnx_runs import LOGITS, feeds, in_torch

Get = Callable[..., Path]
X = np.random.default_rng(1).normal(size=(3, 48)).astype(np.float32)
CLOSE = 3e-5  # float32 sums of two times at most 12 products of order 1, near 10


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., SwapAdapter]:
    def make(name: str, blocks: Array, **more: Any) -> SwapAdapter:
        return runtime.load_adapter(adapter_file(tmp_path / f"{name}.onnx_adapter", {"m": blocks}, **more))

    return make


@pytest.mark.parametrize("counts", [(4, 4), (4, 8), (24, 8)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
def test_sums(counts: tuple[int, int], weights: tuple[float, float], load: Any, tmp_path: Path) -> None:
    session = runtime.session(graph_file(tmp_path / "m.onnx"), threads=1)
    blocks = [random_blocks(count, seed) for seed, count in enumerate(counts)]
    a, b = (load(name, value) for name, value in zip("ab", blocks, strict=True))
    pairs = [a, b] if weights == (1.0, 1.0) else list(zip((a, b), weights, strict=True))
    both = runtime.combine(pairs)
    assert both.base == a.base and both.values()["m.diablo_blocks"].shape[0] == min(counts)
    expected = X + sum(w * apply(X, value, 48) for w, value in zip(weights, blocks, strict=True))
    np.testing.assert_allclose(runtime.run(session, {"x": X}, both)[0], expected, rtol=0, atol=CLOSE)
    binding = runtime.bind(session, {"x": X}, both)
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], expected, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(  # and the parts are what they were
        runtime.run(session, {"x": X}, a)[0], apply(X, blocks[0], 48, X), rtol=0, atol=CLOSE
    )


def test_a_sum_is_saved_as_a_file(load: Any, tmp_path: Path) -> None:
    both = runtime.combine([load("a", random_blocks(4)), (load("b", random_blocks(8)), 0.25)])
    assert str(both.path) == "a + 0.25 × b"
    both.save(tmp_path / "both.onnx_adapter")
    again = runtime.load_adapter(tmp_path / "both.onnx_adapter")
    assert again.base == both.base
    np.testing.assert_array_equal(again.values()["m.diablo_blocks"], both.values()["m.diablo_blocks"])


def test_a_sum_s_values_are_a_copy(load: Any) -> None:
    both = runtime.combine([load("a", random_blocks(4))])
    both.values()["m.diablo_blocks"][:] = 0
    assert both.values()["m.diablo_blocks"].any()


def test_modules_of_one_alone_and_of_none(tmp_path: Path) -> None:
    empty = np.zeros((0, 0, 0), np.float32)
    given = [{"m": random_blocks(4), "n": empty, "o": empty}, {"m": empty, "n": random_blocks(8), "o": empty}]
    loaded = [runtime.load_adapter(adapter_file(tmp_path / f"{i}.onnx_adapter", one)) for i, one in enumerate(given)]
    values = runtime.combine(loaded).values()
    np.testing.assert_array_equal(values["m.diablo_blocks"], given[0]["m"])
    np.testing.assert_array_equal(values["n.diablo_blocks"], given[1]["n"])
    assert values["o.diablo_blocks"].shape == (0, 0, 0)


def test_float16_is_summed_wider(load: Any) -> None:
    blocks = [random_blocks(4, seed).astype(np.float16) for seed in (0, 1)]
    total = runtime.combine([load("a", blocks[0]), load("b", blocks[1])]).values()["m.diablo_blocks"]
    assert total.dtype == np.float16
    np.testing.assert_array_equal(total, (blocks[0].astype(np.float32) + blocks[1]).astype(np.float16))


def test_int8(load: Any, tmp_path: Path) -> None:
    session = runtime.session(graph_file(tmp_path / "m.onnx", stored=TensorProto.INT8), threads=1)
    blocks = [random_blocks(4, 0), random_blocks(8, 1)]
    a, b = (load(name, value, int8=True) for name, value in zip("ab", blocks, strict=True))
    both = runtime.combine([a, (b, 0.5)])
    values = both.values()
    assert values["m.diablo_blocks"].dtype == np.int8 and values["m.diablo_scales"].shape == (4,)
    stored = [from_int8(*to_int8(value)) for value in blocks]
    expected = X + apply(X, stored[0], 48) + 0.5 * apply(X, stored[1], 48)
    got = runtime.run(session, {"x": X}, both)[0]
    # rounded once more: half a step of each of 12 entries that meet values of x up to 3, and more for the norm's sake
    assert np.abs(got - expected).max() <= 0.5 * values["m.diablo_scales"].max() * 12 * 3
    fed = apply(X, from_int8(values["m.diablo_blocks"], values["m.diablo_scales"]), 48, X)
    np.testing.assert_allclose(got, fed, rtol=0, atol=CLOSE)


def test_int8_sums_that_lose_too_much_are_named(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    large, small = np.zeros((4, 12, 12), np.float32), np.full((4, 12, 12), 0.001, np.float32)
    large[:, 0, 0] = 0.2  # sets the scale, 0.2 / 127: of the small ones, a thousandth each, none is near a step
    runtime.combine([load("a", large, int8=True), (load("b", small, int8=True), 0.7)])
    assert "m.diablo_blocks: the sum is off by 0.0" in caplog.text and "wider --block-dtype" in caplog.text


# -------------------------------------------------------------------------------------------------- what it refuses


def test_block_counts_that_cross(load: Any) -> None:
    with pytest.raises(InputError, match=r"a \+ b:\n  m\.diablo_blocks: blocks of shapes .* cannot be summed"):
        runtime.combine([load("a", random_blocks(4)), load("b", random_blocks(6))])


def test_adapters_that_do_not_belong_together(load: Any) -> None:
    a = load("a", random_blocks(4))
    with pytest.raises(InputError, match=r"different bases .*a\.onnx_adapter \(mark 0000001a\), .*b\.onnx_adapter"):
        runtime.combine([a, load("b", random_blocks(4), base=OTHER_BASE)])
    with pytest.raises(InputError, match=r"m\.diablo_blocks is a tensor\(float\) in .*a tensor\(float16\)"):
        runtime.combine([a, load("b", random_blocks(4).astype(np.float16))])
    assert runtime.combine([a, load("b", random_blocks(4), base=None)]).base is None, "one of unknown base taints it"


@pytest.mark.parametrize(
    ("weights", "message"),
    [([], "no adapters were given"), ([1, float("nan")], "its weight is nan"), ([1, 1e39], "too large for float32")],
)
def test_weights(weights: list[float], message: str, load: Any) -> None:
    with pytest.raises(InputError, match=message):
        runtime.combine([(load("a", random_blocks(4)), weight) for weight in weights])


def test_sums_too_large_for_their_type(load: Any) -> None:
    large = load("a", np.full((4, 12, 12), 40000, np.float16))
    with pytest.raises(InputError, match=r"m\.diablo_blocks: the sum is too large for float16; give smaller weights"):
        runtime.combine([large, large])


def test_heads_are_not_summed(load: Any) -> None:
    blocks, head = random_blocks(4), np.arange(48, dtype=np.float32)
    a, plain = load("a", blocks, head_weight=head), load("plain", blocks)
    for others in ([plain], [load("same", blocks, head_weight=head)]):
        both = runtime.combine([(a, 0.5), *others])
        np.testing.assert_array_equal(both.values()["head.weight"], head)  # no weight either
    with pytest.raises(InputError, match=r"head\.weight: .*a\.onnx_adapter, .*b\.onnx_adapter each bring .* head"):
        runtime.combine([a, plain, load("b", blocks, head_weight=-head)])


# ----------------------------------------------------------------------------------------------------- a decoder


def test_an_exported_decoder(exported: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """Half of an adapter of 4 blocks: what torch makes of blocks of half the size."""
    folder = exported("llama")
    session = runtime.session(folder / "model.onnx", threads=1)
    a, b = (runtime.load_adapter(folder / f"adapters/{name}.onnx_adapter") for name in ("a", "b"))
    given = feeds(session)
    whole = Adapter.load(tiny_adapter("llama"))
    halves = {n: dataclasses.replace(m, blocks=m.blocks * np.float32(0.5)) for n, m in whole.modules.items()}
    (tmp_path / "half").mkdir()
    dataclasses.replace(whole, modules=halves).save(tmp_path / "half")
    got = runtime.run(session, given, runtime.combine([(a, 0.5), (b, 0.0)]), ["logits"])[0]
    np.testing.assert_allclose(got, in_torch(tiny_model("llama"), tmp_path / "half"), rtol=0, atol=LOGITS)
    both = runtime.run(session, given, runtime.combine([a, b]), ["logits"])[0]
    assert np.abs(both - runtime.run(session, given, a, ["logits"])[0]).max() > 1000 * LOGITS
