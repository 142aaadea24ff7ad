"""The weights of one module as an export stores them, beside the ones that it should store: what rounding explains.

On an int4 grid the error of an output says little of a single group: every group is off by a third of a step. Looked at
weight by weight, a group that rounding alone has moved is within a step of where it should be, and a broken one is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_export.adapter import AdaptedModule
from diablo_export.blockdiag import Array
from diablo_export.fingerprint import ValuesDigest
from diablo_export.measure.coded import Coded, coded
from diablo_export.measure.places import Graph, Place
from diablo_export.quantization import fresh_grid

_AT_ONCE = 1 << 17  # weights, at least a row: what is made of them stays in the processor's cache

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Fitted = Literal[False, True, "all"]  # no codes, those of groups that meet a block, or all


@dataclass(frozen=True)
class Audit:
    """What is stored, against what should be.

    Attributes:
        worst: root mean square error of the worst group, in steps of the grid that rounding to nearest would take; of
            the groups that no block meets, where codes were `fitted`.
        fitted: of the groups that were fitted to inputs, the squared error of the outputs over that which rounding to
            nearest leaves; 0 where none were.
        digest: of the stored values, where asked for; a merge that fitted them wrote down what they were.
        gain: <stored − base, delta> / <delta, delta> over the weights: 1 when the adapter is in them once; nan where
            nothing was merged.
    """

    worst: float
    fitted: float
    digest: str | None
    gain: float


@dataclass(frozen=True)
class Expected:
    """What the stored weights make of some inputs.

    Attributes:
        error: (rows, out_features): of the outputs, for the error of the weights.
        noise: (out_features,): what onnxruntime's kernel may add by rounding each group of the inputs to int8, as
            expected sum of squares over the rows.
    """

    error: Array
    noise: Array


def audit(
    graph: Graph,
    place: Place,
    linear: nn.Module,
    merged: AdaptedModule | Array | None,
    x: Array,
    *,
    fitted: Fitted,
    hashed: bool = True,
) -> tuple[Audit, Expected] | None:
    """Look at a quantized module's weight; None where it is not quantized.

    Args:
        graph: the exported model.
        place: of the module in it.
        linear: the base's layer in torch.
        merged: what should be in the stored weight beside the base's: blocks, or a dense (out_features, in_features);
            None: nothing.
        x: (rows, in_features) inputs.
        fitted: the codes under the blocks, or all, were chosen for the outputs, and so may be far from the weights.
        hashed: whether to give the digest of the values.
    """
    found = [coded(graph, part.node) for part in place.parts]
    grids = [grid for grid in found if grid is not None]
    if len(grids) < len(found):
        return None
    base = linear.get_parameter("weight").detach().numpy()
    sums = _Sums(np.asarray(base.T if isinstance(linear, Conv1D) else base, np.float32), merged, x, hashed)
    first = 0  # the module's row where a part begins
    for part, grid in zip(place.parts, grids, strict=True):
        sums.add(first, part.rows, grid, fitted)
        first += part.rows[1] - part.rows[0]
    return sums.audit(), Expected(sums.error, sums.noise)


class _Sums:
    """Running figures of one module, part by part."""

    def __init__(self, wanted: Float32, merged: AdaptedModule | Array | None, x: Array, hashed: bool) -> None:
        self.wanted, self.merged, self.x = wanted, merged, x
        self.delta = _delta(merged) if isinstance(merged, AdaptedModule) else merged
        self.error = np.empty((len(x), len(wanted)), np.float32)
        self.noise = np.empty(len(wanted), np.float32)
        self.squares = np.zeros(2)  # of the fitted groups' error over the inputs: as stored, and rounded to nearest
        self.digest = ValuesDigest() if hashed else None
        self.worst = self.dot = self.norm = 0.0

    def add(self, first: int, rows: tuple[int, int], grid: Coded, fitted: Fitted) -> None:
        """Go on with the rows of a node, which begin at the module's row `first`."""
        count, step = rows[1] - rows[0], max(1, _AT_ONCE // self.wanted.shape[1])
        met = np.ones(self.wanted.shape, np.bool_) if fitted == "all" else None
        if fitted and met is None and isinstance(self.merged, AdaptedModule):
            met = _met(self.merged, grid.size)
        groups = (count, -(-self.wanted.shape[1] // grid.size))
        rms, steps = np.empty(groups, np.float32), np.empty(groups, np.float32)
        variance = _variance(self.x, grid.size)
        for start in range(0, count, step):
            own = slice(start, min(start + step, count))
            at = slice(first + own.start, first + own.stop)
            stored = grid.rows(rows[0] + own.start, rows[0] + own.stop)
            target = self.wanted[at] if self.delta is None else self.wanted[at] + self.delta[at]
            error = stored - target
            self.error[:, at] = self.x @ error.T
            self.noise[at] = (stored * stored) @ variance
            steps[own] = steps_of(target, grid)
            rms[own] = rms_of(error if met is None else np.where(met[at], 0, error), grid.size)
            if met is not None:
                self._add_fitted(error, _rounded(target, grid) - target, met[at])
            if self.delta is not None:
                self.dot += float((error * self.delta[at]).sum(dtype=np.float64))
                self.norm += float((self.delta[at] ** 2).sum(dtype=np.float64))
            if self.digest is not None:
                self.digest.add(stored)
        steps = np.maximum(steps, 1e-3 * steps.mean() + 1e-30)  # an empty group has no grid of its own
        self.worst = float(np.maximum(self.worst, (rms / steps).max()))  # numpy's keeps a NaN

    def _add_fitted(self, error: Float32, nearest: Float32, met: Mask) -> None:
        for kind, one in enumerate((error, nearest)):
            self.squares[kind] += ((self.x @ np.where(met, one, 0).T) ** 2).sum(dtype=np.float64)

    def audit(self) -> Audit:
        """The figures of all parts."""
        gain = 1 + self.dot / self.norm if self.norm else float("nan")
        digest = self.digest.hex() if self.digest is not None else None
        return Audit(self.worst, float(self.squares[0] / (self.squares[1] + 1e-30)), digest, gain)


def _met(module: AdaptedModule, size: int) -> Mask:
    """Which weights lie in a group that meets a block: (out_features, in_features)."""
    met = np.zeros((module.out_features, module.in_features), np.bool_)
    for inputs, outputs in module.shape.slices():
        met[outputs, inputs.start // size * size : -(-inputs.stop // size) * size] = True
    return met


def _delta(module: AdaptedModule) -> Float32:
    """blockdiag(D)ᵀ, cropped: (out_features, in_features)."""
    dense = np.zeros((module.out_features, module.in_features), np.float32)
    for block, (inputs, outputs) in zip(module.blocks, module.shape.slices(), strict=True):
        size_in, size_out = inputs.stop - inputs.start, outputs.stop - outputs.start
        dense[outputs, inputs] = block[:size_in, :size_out].astype(np.float32).T
    return dense


def _rounded(target: Float32, grid: Coded) -> Float32:
    """The target rounded to the nearest on fresh groups of the same kind."""
    codes, scales, zeros = fresh_grid(_grouped(target, grid.size), grid.bits, not grid.has_zeros)
    values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    return np.asarray(values.reshape(len(target), -1)[:, : target.shape[1]], np.float32)


def steps_of(target: Float32, grid: Coded) -> Float32:
    """The steps of the grid that suits each group of the target: (rows, groups)."""
    grouped = _grouped(target, grid.size)
    if grid.has_zeros:
        spans = np.maximum(grouped.max(-1), 0) - np.minimum(grouped.min(-1), 0)
    else:
        spans = 2 * np.abs(grouped).max(-1)
    return np.asarray(spans / (2**grid.bits - 1), np.float32)


def rms_of(error: Float32, size: int) -> Float32:
    """The root mean square of each group: (rows, groups)."""
    grouped = _grouped(error, size)
    lengths = np.full(grouped.shape[1], size, np.float32)
    lengths[-1] -= -error.shape[1] % size
    return np.asarray(np.sqrt(np.einsum("rgk,rgk->rg", grouped, grouped) / lengths), np.float32)


def _variance(x: Array, size: int) -> Float32:
    """Of each input rounded to 255 steps between ± the largest of its group, the sum over rows: (in_features,)."""
    steps = np.abs(_grouped(np.asarray(x, np.float32), size)).max(-1) / np.float32(127)  # (rows, groups)
    return np.repeat((steps**2).sum(0) / 12, size)[: x.shape[1]]


def _grouped(values: Float32, size: int) -> Float32:
    """(rows, inputs) → (rows, groups, size), zeros past the last input."""
    short = -values.shape[1] % size
    whole = np.pad(values, ((0, 0), (0, short))) if short else values
    return whole.reshape(len(values), -1, size)
