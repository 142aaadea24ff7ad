from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from diablo_export.block_storage import add, base_mark, from_int8, relative_error, to_int8
from diablo_export.blockdiag import Array, BlockShape, dense
from diablo_export.errors import InputError


def blocks(k: int, n: int, num_blocks: int, seed: int = 0) -> Array:
    shape = BlockShape.for_linear(k, n, num_blocks).blocks
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_int8_is_the_nearest_code_of_each_block() -> None:
    values = blocks(48, 24, 8) * np.geomspace(1e-6, 1e3, 8, dtype=np.float32)[:, None, None]
    codes, scales = to_int8(values)
    assert codes.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == (8,)
    np.testing.assert_array_equal(scales, np.abs(values).max((1, 2)) / np.float32(127))
    assert np.abs(codes).max((1, 2)).tolist() == [127] * 8, "each block uses its whole range"
    # half a step, and float32's own rounding of the quotient and the product
    assert np.all(np.abs(from_int8(codes, scales) - values) <= scales[:, None, None] * (0.5 + 1e-5))


def test_zeros_and_what_is_next_to_nothing() -> None:
    values = np.zeros((3, 2, 2), np.float32)
    values[1], values[2] = 1e-44, 2.0
    assert to_int8(np.full((1, 1, 1), -2.6e-43))[0] == -127  # 1.5 of the smallest float32 for a step, which is 1
    codes, scales = to_int8(values)
    assert codes[:2].any() == 0 and scales[:2].tolist() == [0, 0] and codes[2].tolist() == [[127, 127]] * 2
    empty, none = to_int8(np.zeros((0, 0, 0), np.float32))
    assert empty.shape == (0, 0, 0) and none.shape == (0,)
    assert from_int8(empty, none).shape == (0, 0, 0)


def test_relative_error() -> None:
    values = blocks(64, 64, 4)
    codes, scales = to_int8(values)
    # a step is 1/127 of a block's largest value, here about 3.2 deviations; its error is a step over √12
    assert relative_error(values, from_int8(codes, scales)) == pytest.approx(3.2 / 127 / np.sqrt(12), rel=0.3)
    assert relative_error(values, values) == 0
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(values, np.zeros_like(values)) == 1


# K, N, counts: equal; one divides the other; padded on both sides; three at once
@pytest.mark.parametrize(
    ("k", "n", "counts"),
    [(48, 24, (4, 4)), (48, 24, (4, 8)), (48, 24, (8, 4)), (48, 24, (2, 8, 4)), (9, 9, (1, 3))],
)
def test_sums_are_those_of_the_matrices(k: int, n: int, counts: tuple[int, ...]) -> None:
    parts = [(blocks(k, n, count, seed), 0.5 + seed) for seed, count in enumerate(counts)]
    total = add(parts)
    assert total.shape[0] == min(part.shape[0] for part, _ in parts)
    wanted = sum(weight * dense(part, k, n).astype(np.float64) for part, weight in parts)
    # three values near 3, each rounded once
    np.testing.assert_allclose(dense(total, k, n), wanted, rtol=0, atol=3 * 3 * 2**-23)


def test_blocks_behind_the_end_of_a_module_are_left_out() -> None:
    whole, halves = blocks(10, 14, 1), np.random.default_rng(5).normal(size=(6, 5, 7)).astype(np.float32)
    wanted = dense(whole, 10, 14) + dense(halves, 10, 14)  # two of the six meet it
    np.testing.assert_array_equal(dense(add([(whole, 1), (halves, 1)]), 10, 14), wanted)


def test_empty_blocks_add_nothing() -> None:
    empty, filled = np.zeros((0, 0, 0), np.float32), blocks(8, 8, 2)
    np.testing.assert_array_equal(add([(empty, 1), (filled, 1), (empty, 3)]), filled)
    assert add([(empty, 1), (empty, 1)]).shape == add([]).shape == (0, 0, 0)


@pytest.mark.parametrize(("k", "n", "counts"), [(48, 24, (4, 6)), (9, 100, (2, 4)), (64, 48, (4, 7)), (8, 10, (2, 4))])
def test_sums_that_are_not_block_diagonal(k: int, n: int, counts: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"cannot be summed: block \d+ of the finer ones lies in no block"):
        add([(blocks(k, n, count), 1) for count in counts])


def test_marks() -> None:
    assert base_mark("ff" * 32) == 0x7FFFFFFF
    assert base_mark("0000002a" + "0" * 56) == 42
    with pytest.raises(InputError, match=r"diablo\.base is 'XY'; it must be a SHA-256"):
        base_mark("XY")


def test_needs_numpy_alone() -> None:
    code = "import sys, diablo_export.block_storage; print({m.partition('.')[0] for m in sys.modules} & set(sys.argv))"
    heavy = ["onnx", "onnxruntime", "onnx_ir", "torch", "safetensors", "ml_dtypes", "xxhash", "rich", "click"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
