"""The block maths against dense matrices, and its padding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from diablo_export import blockdiag
from diablo_export.blockdiag import BlockShape
from diablo_export.errors import InputError

SIZES = [(64, 64, 4), (64, 128, 8), (7, 9, 3), (100, 60, 7), (10, 10, 4), (9, 100, 4), (65, 64, 64), (172, 64, 8)]


@pytest.mark.parametrize(("inputs", "outputs", "num_blocks"), SIZES)
def test_apply_equals_the_dense_product(inputs: int, outputs: int, num_blocks: int) -> None:
    random = np.random.default_rng(0)
    shape = BlockShape.for_linear(inputs, outputs, num_blocks)
    blocks = random.normal(size=shape.blocks)
    x, y0 = random.normal(size=(2, 3, inputs)), random.normal(size=(2, 3, outputs))
    wanted = y0 + x @ blockdiag.dense(blocks, inputs, outputs)
    # float64 sums of up to 172 terms of size 1: 172 · 2⁻⁵³ ≈ 2e-14
    np.testing.assert_allclose(blockdiag.apply(x, blocks, outputs, y0), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "num_blocks"), SIZES)
def test_under_blocks_undoes_dense(inputs: int, outputs: int, num_blocks: int) -> None:
    shape = BlockShape.for_linear(inputs, outputs, num_blocks)
    blocks = np.random.default_rng(0).normal(size=shape.blocks)
    weight = blockdiag.dense(blocks, inputs, outputs).T
    cut = blockdiag.under_blocks(weight, shape)
    assert np.array_equal(blockdiag.dense(cut, inputs, outputs).T, weight) and weight.any()
    assert np.count_nonzero(cut) == shape.live_parameters


@pytest.mark.parametrize(("inputs", "outputs", "num_blocks"), SIZES)
def test_add_to_weight_is_the_transposed_dense_and_touches_nothing_else(
    inputs: int, outputs: int, num_blocks: int
) -> None:
    random = np.random.default_rng(1)
    blocks = random.normal(size=BlockShape.for_linear(inputs, outputs, num_blocks).blocks)
    weight = random.normal(size=(outputs, inputs))
    merged = blockdiag.add_to_weight(weight, blocks)
    delta = blockdiag.dense(blocks, inputs, outputs).T
    np.testing.assert_array_equal(merged, weight + delta)
    np.testing.assert_array_equal(merged[delta == 0], weight[delta == 0])


def test_empty_blocks_give_y0() -> None:
    y0 = np.ones((2, 5), np.float32)
    np.testing.assert_array_equal(blockdiag.apply(np.ones((2, 3)), np.zeros((0, 0, 0)), 5, y0), y0)


def test_bfloat16_sum_is_rounded_once() -> None:
    weight = np.full((2, 2), 1.0, ml_dtypes.bfloat16)
    blocks = np.full((1, 2, 2), 2**-9 + 2**-12, np.float32)  # rounds to 1 on its own, above half a step in the sum
    assert float(blockdiag.add_to_weight(weight, blocks)[0, 0]) == 1.0
    assert float(blockdiag.add_to_weight(weight, blocks * 2)[0, 0]) == 1.0 + 2**-7


def test_unmerge_gives_the_weight_back() -> None:
    random = np.random.default_rng(2)
    weight, blocks = random.normal(size=(8, 8)), random.normal(size=(2, 4, 4))
    back = blockdiag.add_to_weight(blockdiag.add_to_weight(weight, blocks), blocks, sign=-1)
    np.testing.assert_allclose(back, weight, atol=1e-15)  # one float64 rounding each way


def test_effective_block_count_is_the_papers() -> None:
    assert BlockShape.for_linear(100, 60, 7).blocks == (7, 15, 9)
    assert BlockShape.for_linear(10, 10, 4).blocks == (4, 3, 3)
    assert BlockShape.for_linear(7, 64, 7).blocks == (7, 1, 10)
    assert BlockShape.for_linear(9, 9, 6).blocks == (5, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "covered"), [((9, 100, 4), 75), ((65, 64, 64), 33), ((5, 64, 5), 64), ((64, 64, 8), 64)]
)
def test_coverage(sizes: tuple[int, int, int], covered: int) -> None:
    shape = BlockShape.for_linear(*sizes)
    assert shape.covered_outputs == covered
    changed = blockdiag.dense(np.ones(shape.blocks), shape.in_features, shape.out_features).any(axis=0)
    assert int(changed.sum()) == covered


def test_live_parameters_leave_out_the_padding() -> None:
    shape = BlockShape.for_linear(100, 60, 7)
    assert (np.prod(shape.blocks), shape.live_parameters) == (945, 870)


@pytest.mark.parametrize("num_blocks", [0, -1, 9, 64])
def test_num_blocks_out_of_range(num_blocks: int) -> None:
    with pytest.raises(InputError, match=rf"num_blocks is {num_blocks}, .*8 inputs and 16 outputs takes 1 to 8"):
        BlockShape.for_linear(8, 16, num_blocks)


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"4 × 3 = 12 positions, but the module's in_features is 16"):
        blockdiag.shape_of(np.zeros((4, 3, 4)), 16, 16)
    with pytest.raises(InputError, match=r"module's out_features is 17"):
        blockdiag.shape_of(np.zeros((4, 4, 4)), 16, 17)
    with pytest.raises(InputError, match=r"\(num_blocks, block_size_in, block_size_out\)"):
        blockdiag.shape_of(np.zeros((4, 4)), 16, 16)
