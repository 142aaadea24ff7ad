from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.padding import compare, pad
from diablo_export.measure.prompts import Sample
from diablo_export.measure.torch_runner import TorchRunner
from diablo_export.trainer.model import load_tuned

Get = Callable[[str], Path]
ROWS = [np.array([5, 6, 7]), np.array([8])]


def sample(length: int) -> Sample:
    return Sample(np.arange(3, 3 + length), np.ones(length, np.bool_))


def test_rows_are_filled_at_the_right_or_the_left() -> None:
    right, left = pad(ROWS, 9), pad(ROWS, 9, left=True)
    assert right.ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left.ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert pad(ROWS, 0, length=5).ids.shape == (2, 5)


def test_what_was_padded_is_taken_out_again() -> None:
    logits = np.arange(12).reshape(2, 3, 2)
    assert [row.tolist() for row in pad(ROWS, 9, left=True).unpadded(logits)] == [logits[0].tolist(), [[10, 11]]]
    assert [row.tolist() for row in pad(ROWS, 9).unpadded(logits[:, 0])] == [[[0, 1]], [[6, 7]]]  # a classifier


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_torch_gives_each_row_what_it_gives_it_alone(
    left: bool, architecture: str, tiny_model: Get, tiny_adapter: Get
) -> None:
    model, _ = load_tuned(tiny_model(architecture), Adapter.load(tiny_adapter(architecture)))
    runner = TorchRunner(model)
    rows = [sample(length).ids for length in (9, 4, 1)]
    for row, found in zip(rows, runner.batch(rows, 0, left=left), strict=True):
        # float32 sums in another order, on logits of order 10
        np.testing.assert_allclose(found, runner.prefill(row), rtol=0, atol=1e-4)


def test_a_genai_graph_takes_padding_at_the_right_and_not_at_the_left(
    exported: Callable[..., Path], tiny_model: Get, tiny_adapter: Get
) -> None:
    """GroupQueryAttention takes the count of ones in the mask for the end of each row."""
    folder = exported("llama")
    runner = OnnxRunner(runtime.session(folder / "model.onnx"), cache_shape=cache_shape(folder))
    rows = [sample(length).ids for length in (9, 4, 1)]
    right, left = (runner.batch(rows, 0, left=side) for side in (False, True))
    for row, one in zip(rows, right, strict=True):
        np.testing.assert_allclose(one, runner.prefill(row), rtol=0, atol=1e-4)
    assert np.abs(left[1] - runner.prefill(rows[1])).max() > 0.1
    model, _ = load_tuned(tiny_model("llama"), Adapter.load(tiny_adapter("llama")))
    tuned = TorchRunner(model)
    found = compare(tuned, runner, [sample(40), sample(15)], folder / "model.onnx", classifier=False)
    assert found is not None
    assert found["lengths"] == [24, 15, 11, 5]
    assert found["left"] is None and found["right"] < 1e-4


def test_single_tokens_are_no_padded_batch(tiny_model: Get, tiny_adapter: Get) -> None:
    model, _ = load_tuned(tiny_model("llama"), Adapter.load(tiny_adapter("llama")))
    runner = TorchRunner(model)
    assert compare(runner, runner, [sample(1)], None, classifier=False) is None
    whole = compare(runner, runner, [sample(12)], None, classifier=True)
    assert whole is not None and whole["left"] is None  # a classifier is padded at the right
