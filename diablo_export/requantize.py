"""Codes, scales and zero points for weights that are to change on their grid: four ways to choose them, in numpy.

All work on some rows of a weight, cut into groups: target (rows, groups, size), H (groups · size, groups · size).

    nearest     each group to the nearest on the grid that it has: for blocks that are whole steps of it
    rounded     each group to the nearest, on a fresh grid: what onnxruntime does by default
    refitted    scales searched and fitted for the least squared error of the weights; needs no data
    calibrated  codes and scales for the least squared error of the layer's output, (w − t)ᵀ H (w − t), where
                H = E[x xᵀ] over inputs x: errors may cancel along directions in which inputs vary together

`calibrated` is coordinate descent on the codes, column after column, with closed-form scales between the sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array, BlockShape
from diablo_export.quantization import Codes, Float32, fresh_grid

_RATIOS = np.linspace(0.5, 1.1, 13)  # of the scale that just holds a group's largest weight
_FITS = 3  # alternations of codes and scale: the error no longer falls after that
_SWEEPS = 4
_WHOLE = 0.05  # of a step: scales in float16 put the fifteenth step off by 0.007
_DAMPING = 0.01  # of H's mean diagonal, added to it: directions that the text hardly shows are not free


@dataclass(frozen=True)
class Grid:
    """Some rows of a quantized weight, unpacked: w = (codes − zeros) · scales, group by group."""

    codes: Codes  # (rows, groups, size)
    scales: Float32  # (rows, groups)
    zeros: Array  # (rows, groups): uint8, or float32 anywhere between the codes, as HQQ has them
    bits: int
    symmetric: bool  # zeros stay 2^(bits − 1)

    @classmethod
    def joined(cls, parts: Sequence[Grid]) -> Grid:
        """The grid whose rows are those of the parts, in order."""
        codes, scales, zeros = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")
        )
        return cls(codes, scales, zeros, parts[0].bits, parts[0].symmetric)

    def values(self) -> Float32:
        """The weights, (rows, groups, size)."""
        return (self.codes.astype(np.float32) - self.zeros[..., None]) * self.scales[..., None]

    def weight(self, in_features: int) -> Float32:
        """The weights without what pads the last group, (rows, in_features)."""
        return ungrouped(self.values(), in_features)

    def part(self, rows: slice, groups: slice) -> Grid:
        """Some of its rows and groups, as views."""
        pieces = self.codes[rows, groups], self.scales[rows, groups], self.zeros[rows, groups]
        return Grid(*pieces, self.bits, self.symmetric)

    def stored_as(self, dtype: npt.DTypeLike) -> Grid:
        """With scales, and zero points that are floats, rounded to the dtype that they are stored in."""
        scales = self.scales.astype(dtype).astype(np.float32)
        zeros = self.zeros.astype(dtype).astype(np.float32) if self.between else self.zeros
        return replace(self, scales=scales, zeros=zeros)

    @property
    def between(self) -> bool:
        """Whether zero points are floats."""
        return bool(np.issubdtype(self.zeros.dtype, np.floating))

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)


def touched(shape: BlockShape, size: int) -> Iterator[tuple[slice, slice]]:
    """Per block that meets any weight, its output rows and the groups of `size` inputs that it meets."""
    for inputs, outputs in shape.slices():
        if inputs.start < inputs.stop and outputs.start < outputs.stop:
            yield outputs, slice(inputs.start // size, -(-inputs.stop // size))


def met(shape: BlockShape, size: int) -> Iterator[tuple[slice, slice]]:
    """Per block, also one that meets nothing, the inputs in the groups that it meets, up to the last, and its rows."""
    for inputs, outputs in shape.slices():
        stop = -(-inputs.stop // size) * size if inputs.start < inputs.stop else 0
        yield slice(min(inputs.start // size * size, stop), min(stop, shape.in_features)), outputs


def with_touched(base: Grid, target: Float32, shape: BlockShape, choose: Callable[[Float32, Grid, int], Grid]) -> Grid:
    """The grid of a whole layer, (out, groups, size), with touched groups chosen anew.

    Args:
        base: what the layer holds.
        target: what it should hold, (out, groups, size).
        shape: of its blocks.
        choose: (target, base, number of the block among those that meet any weight) → the grid of its groups.
    """
    codes, scales, zeros = base.codes.copy(), base.scales.copy(), base.zeros.copy()
    for number, (rows, groups) in enumerate(touched(shape, base.codes.shape[-1])):
        new = choose(target[rows, groups], base.part(rows, groups), number)
        codes[rows, groups], scales[rows, groups], zeros[rows, groups] = new.codes, new.scales, new.zeros
    return replace(base, codes=codes, scales=scales, zeros=zeros)


def grouped(values: Float32, size: int) -> Float32:
    """(out, in_features) → (out, groups, size), zeros past the last input."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % size)))
    return padded.reshape(len(values), -1, size)


def ungrouped(values: Array, in_features: int) -> Array:
    """What `grouped` was given: (out, groups, size) → (out, in_features)."""
    return values.reshape(len(values), -1)[:, :in_features]


def whole_steps(target: Float32, like: Grid) -> bool:
    """Whether every weight lies on the grid that its group has, so that nothing is lost by keeping it."""
    there = nearest(target, like)
    return bool((np.abs(there.values() - target) <= _WHOLE * np.abs(like.scales)[..., None]).all())


def rounded(target: Float32, like: Grid) -> Grid:
    """Each group rounded to a fresh grid of its own, bit for bit as `quantization.quantize` does.

    Where zero points are floats, the grid spans the group from its smallest weight to its largest.
    """
    if like.between:
        smallest, spread = target.min(-1), np.ptp(target, -1)
        scales = np.where(spread > 0, spread / np.float32(like.top), np.maximum(np.abs(smallest), np.float32(1e-30)))
        return _on(target, like, scales, -smallest / scales)
    codes, scales, zeros = fresh_grid(target, like.bits, like.symmetric)
    return replace(like, codes=codes, scales=scales, zeros=like.zeros if like.symmetric else zeros)


def nearest(target: Float32, grid: Grid) -> Grid:
    """Each weight as the nearest of the values that the grid has now: scales and zero points stay."""
    return _on(target, grid, grid.scales, grid.zeros)


def refitted(target: Float32, like: Grid, dtype: npt.DTypeLike = np.float32, positive: bool = False) -> Grid:
    """The grid of least squared error per group: the given one, a fresh one, or that with a searched, fitted scale.

    Args:
        target: what the groups should hold.
        like: the grid that they have now; a group that it suits best keeps it.
        dtype: what scales are stored in.
        positive: no scale may be negative, which onnxruntime's may.
    """
    fresh = rounded(target, like)
    if positive:
        fresh = replace(fresh, scales=np.abs(fresh.scales))
    best = nearest(target, like)
    least = _squared(best, target)
    for ratio in _RATIOS:
        for sign in (1, -1) if like.symmetric and not positive else (1,):
            trial = replace(fresh, scales=fresh.scales * np.float32(ratio * sign)).stored_as(dtype)
            for _ in range(_FITS):
                trial = _on(target, trial, trial.scales, trial.zeros)
                trial = _fitted_to_weights(trial, target).stored_as(dtype)
            best, least = _better(best, least, trial, _squared(trial, target))
    return best


def calibrated(target: Float32, starts: list[Grid], moments: Float32, dtype: npt.DTypeLike = np.float32) -> Grid:
    """Codes and scales of least output error, row by row from the start that ends best.

    Args:
        target: what the rows should hold.
        starts: grids to begin at, such as the one that the rows have now and a refitted one.
        moments: H = E[x xᵀ] of the inputs that these groups read, (groups · size, groups · size).
        dtype: what scales are stored in.
    """
    damped = moments + np.eye(len(moments), dtype=np.float32) * (_DAMPING * max(np.diag(moments).mean(), 1e-12))
    finished = [_descended(target, start, damped.astype(np.float32), dtype) for start in starts]
    losses = np.stack([output_error(grid, target, damped) for grid in finished])  # (starts, rows)
    chosen = losses.argmin(0)
    codes, scales, zeros = (
        np.stack([getattr(grid, name) for grid in finished])[chosen, np.arange(len(target))]
        for name in ("codes", "scales", "zeros")
    )
    return replace(starts[0], codes=codes, scales=scales, zeros=zeros)


def output_error(grid: Grid, target: Float32, moments: Float32) -> Float32:
    """(w − t)ᵀ H (w − t) of each row."""
    error = (grid.values() - target).reshape(len(target), -1)
    return np.asarray(((error @ moments) * error).sum(-1), np.float32)


def _descended(target: Float32, start: Grid, moments: Float32, dtype: npt.DTypeLike) -> Grid:
    grid = _on(target, start, start.scales, start.zeros)
    for _ in range(_SWEEPS):
        grid = _sweep(grid, target, moments)
        fitted = replace(grid, scales=_fitted_to_outputs(grid, target, moments).astype(dtype).astype(np.float32))
        before, after = output_error(grid, target, moments), output_error(fitted, target, moments)
        keep = (after < before)[:, None]  # damping and the dtype's rounding can make a fitted scale the worse one
        grid = replace(grid, scales=np.where(keep, fitted.scales, grid.scales))
    return _sweep(grid, target, moments)


def _sweep(grid: Grid, target: Float32, moments: Float32) -> Grid:
    """Every code once, each to the best value while all others stay."""
    rows, groups, size = target.shape
    codes = grid.codes.astype(np.float32).reshape(rows, -1)
    error = (grid.values() - target).reshape(rows, -1)
    gradient = error @ moments  # (rows, columns): half the derivative
    usable = np.where(grid.scales == 0, np.float32(np.inf), grid.scales)  # a group of zeros stays one
    for column in range(groups * size):
        if moments[column, column] <= 0:
            continue
        scale = usable[:, column // size]
        wanted = codes[:, column] - gradient[:, column] / (moments[column, column] * scale)
        new = np.clip(np.rint(wanted), 0, grid.top)
        moved = np.flatnonzero(new != codes[:, column])
        if len(moved):
            change = (new - codes[:, column])[moved] * scale[moved]
            gradient[moved] += change[:, None] * moments[column]
            codes[:, column] = new
    return replace(grid, codes=codes.astype(np.uint8).reshape(grid.codes.shape))


def _fitted_to_outputs(grid: Grid, target: Float32, moments: Float32) -> Float32:
    """The best scale of each group, one group after the other, for codes that stay."""
    rows, groups, size = target.shape
    steps = grid.codes.astype(np.float32) - grid.zeros[..., None]  # (rows, groups, size)
    scales = grid.scales.copy()
    gradient = (grid.values() - target).reshape(rows, -1) @ moments
    for group in range(groups):
        here = slice(group * size, (group + 1) * size)
        along = steps[:, group] @ moments[here]  # (rows, columns)
        curvature = (along[:, here] * steps[:, group]).sum(-1)
        slope = (gradient[:, here] * steps[:, group]).sum(-1)
        change = -np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
        scales[:, group] += change
        gradient += change[:, None] * along
    return scales


def _on(target: Float32, grid: Grid, scales: Float32, zeros: Array) -> Grid:
    """The target rounded to the nearest on these scales and zero points."""
    usable = np.where(scales == 0, np.float32(np.inf), scales)[..., None]
    codes = np.clip(np.rint(target / usable + zeros[..., None]), 0, grid.top)
    return replace(grid, codes=codes.astype(np.uint8), scales=scales, zeros=zeros)


def _fitted_to_weights(grid: Grid, target: Float32) -> Grid:
    """With the best scale of each group for its codes, Σ t·u / Σ u², u = codes − zeros; then the best float zero."""
    steps = grid.codes.astype(np.float32) - grid.zeros[..., None]
    square = (steps**2).sum(-1)
    scales: Float32 = np.divide((target * steps).sum(-1), square, out=grid.scales.copy(), where=square > 0)
    if not grid.between:
        return replace(grid, scales=scales)
    usable = np.where(scales == 0, np.float32(np.inf), scales)
    return replace(grid, scales=scales, zeros=(grid.codes - target / usable[..., None]).mean(-1))


def _squared(grid: Grid, target: Float32) -> Float32:
    return np.asarray(((grid.values() - target) ** 2).sum(-1), np.float32)  # (rows, groups)


def _better(best: Grid, least: Float32, trial: Grid, error: Float32) -> tuple[Grid, Float32]:
    """Group by group the one of smaller error."""
    wins = error < least
    merged = replace(
        best,
        codes=np.where(wins[..., None], trial.codes, best.codes),
        scales=np.where(wins, trial.scales, best.scales),
        zeros=np.where(wins, trial.zeros, best.zeros),
    )
    return merged, np.where(wins, error, least)
