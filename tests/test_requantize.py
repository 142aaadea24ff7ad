from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from diablo_export.blockdiag import BlockShape
from diablo_export.quantization import dequantize, quantize, unpack
from diablo_export.requantize import (
    Grid,
    calibrated,
    grouped,
    output_error,
    refitted,
    rounded,
    touched,
    whole_steps,
    with_touched,
)

Floats = npt.NDArray[np.float32]
SIZE = 16


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Floats:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def base(bits: int = 4, symmetric: bool = True, rows: int = 12, groups: int = 3) -> Grid:
    whole = quantize(random(rows, groups * SIZE), bits, SIZE, symmetric)
    zeros = np.full((rows, groups), 2 ** (bits - 1), np.uint8)
    if whole.zero_points is not None:
        zeros = unpack(whole.zero_points, bits, groups)
    return Grid(unpack(whole.codes, bits, SIZE), whole.scales, zeros, bits, symmetric)


def correlated(columns: int) -> Floats:
    """E[x xᵀ] of inputs that vary along few directions, as those of real layers do."""
    x = random(400, 6, seed=5) @ random(6, columns, seed=6) + random(400, columns, seed=7, scale=0.1)
    return np.asarray(x.T @ x / len(x), np.float32)


def squared(grid: Grid, target: Floats) -> float:
    return float(((grid.values() - target) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_the_quantizers(bits: int, symmetric: bool) -> None:
    target = random(12, 3, SIZE, seed=1)
    whole = quantize(target.reshape(12, -1), bits, SIZE, symmetric)
    assert np.array_equal(rounded(target, base(bits, symmetric)).values().reshape(12, -1), dequantize(whole))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_refit_is_nearer_than_rounding(bits: int, symmetric: bool) -> None:
    grid = base(bits, symmetric)
    target = grid.values() + random(12, 3, SIZE, seed=2, scale=0.3)
    fitted = refitted(target, grid)
    # a searched scale saves a tenth of the squared error at least, at few bits far more
    assert squared(fitted, target) < 0.9 * squared(rounded(target, grid), target)
    assert fitted.codes.max() <= fitted.top


def test_a_refit_keeps_a_grid_that_fits() -> None:
    grid = base()
    kept = refitted(grid.values(), grid)
    assert np.array_equal(kept.codes, grid.codes) and np.array_equal(kept.scales, grid.scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_calibration_lowers_the_error_of_outputs(bits: int, symmetric: bool) -> None:
    grid, moments = base(bits, symmetric), correlated(3 * SIZE)
    target = grid.values() + random(12, 3, SIZE, seed=3, scale=0.05)
    fitted = refitted(target, grid)
    found = calibrated(target, [grid, fitted], moments)
    error = output_error(found, target, moments)
    # inputs of six directions leave most of the 48 weights of a row free to cancel errors, with 4 codes fewer
    before = min(output_error(each, target, moments).sum() for each in (grid, fitted))
    assert error.sum() < (0.5 if bits == 2 else 0.3) * before
    assert found.codes.max() <= found.top


@pytest.mark.parametrize("dtype", [np.float32, np.float16])  # in float16 the fitted scale is the worse one
def test_calibration_is_never_worse_than_its_starts(dtype: npt.DTypeLike) -> None:
    grid, moments = base(2), correlated(3 * SIZE)
    target = grid.values()  # the first start is exact
    found = calibrated(target, [grid, rounded(random(12, 3, SIZE, seed=9), grid)], moments, dtype)
    assert np.array_equal(found.values(), target)


def test_a_scale_may_turn_its_sign() -> None:
    """Eight steps on one side of zero and seven on the other: which side is which is a choice."""
    grid, target = base(rows=200), random(200, 3, SIZE, seed=2)
    above = replace(grid, scales=np.abs(grid.scales))
    fresh, fitted, positive = rounded(target, above), refitted(target, above), refitted(target, above, positive=True)
    assert (np.sign(fitted.scales) != np.sign(fresh.scales)).any()
    assert squared(fitted, target) < squared(positive, target) and positive.scales.min() > 0


def test_whole_steps_are_on_the_grid_within_what_float16_scales_lose() -> None:
    grid = base()
    for away, whole in ((0.0, True), (0.04, True), (0.1, False), (16.0, False)):
        assert whole_steps(grid.values() + np.float32(away) * grid.scales[..., None], grid) is whole


def test_scales_are_those_that_can_be_stored() -> None:
    grid, moments = base(), correlated(3 * SIZE)
    stored = Grid(grid.codes, grid.scales.astype(np.float16).astype(np.float32), grid.zeros, 4, True)
    target = grid.values() * 1.1
    for found in (calibrated(target, [stored], moments, np.float16), refitted(target, stored, np.float16)):
        assert np.array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
        assert not np.array_equal(found.scales, stored.scales)


def test_a_group_of_zeros_stays_one() -> None:
    grid = base()
    empty = Grid(grid.codes, np.zeros_like(grid.scales), grid.zeros, 4, True)
    zero = np.zeros((12, 3, SIZE), np.float32)
    assert not refitted(zero, empty).values().any()
    found = calibrated(zero, [empty], correlated(3 * SIZE))
    assert not found.values().any() and (found.codes == 8).all()


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
def test_only_touched_groups_change(num_blocks: int) -> None:
    shape = BlockShape.for_linear(44, 12, num_blocks)  # 44 inputs: the last group is padded
    grid = base()
    target = grouped(random(12, 44, seed=4), SIZE)
    changed = with_touched(grid, target, shape, lambda wanted, old, number: rounded(wanted, old))
    met = np.zeros((12, 3), np.bool_)
    for inputs, outputs in shape.slices():
        met[outputs, inputs.start // SIZE : -(-inputs.stop // SIZE)] = True
    assert 0 < met.mean() < 1
    assert np.array_equal(changed.codes[~met], grid.codes[~met])
    assert np.array_equal(changed.scales[~met], grid.scales[~met])
    assert np.array_equal(changed.values()[met], rounded(target, grid).values()[met])
    assert [part[1].stop for part in touched(shape, SIZE)][-1] == 3


def test_float_zero_points_lie_between_the_codes_and_are_fitted() -> None:
    target = random(12, 3, SIZE, seed=3) + 1.5
    old = base(symmetric=False)
    between = Grid(old.codes, old.scales, old.zeros.astype(np.float32) + np.float32(0.3), 4, False)
    nearest = rounded(target, between)
    # it spans each group exactly, so no weight is farther than half a step away
    assert (np.abs(nearest.values() - target) <= 0.501 * nearest.scales[..., None]).all()
    assert (nearest.zeros != np.rint(nearest.zeros)).any()
    fitted = refitted(target, between, np.float16)
    assert squared(fitted, target) < 0.95 * squared(nearest, target)
    assert np.array_equal(fitted.zeros, fitted.zeros.astype(np.float16)), "as it is stored"
    flat = rounded(np.full((1, 1, SIZE), -0.25, np.float32), between.part(slice(1), slice(1)))
    np.testing.assert_allclose(flat.values(), -0.25, rtol=1e-6)
