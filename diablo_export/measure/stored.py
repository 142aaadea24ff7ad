"""The weights of one module as an export stores them, beside the ones that it should store: what rounding explains.

On an int4 grid the error of an output says little of a single group: every group is off by a third of a step. Looked at
weight by weight, a group that rounding alone has moved is within a step of where it should be, and a broken one is not.
"""

from __future__ import annotations

from dataclasses import dataclass

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

_ROWS = 4096  # of a weight at a time: a large head is never held three times

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Audit:
    """What is stored, against what should be.

    Attributes:
        worst: root mean square error of the worst group, in steps of the grid that rounding to nearest would take; of
            the groups that no block meets, where codes were `fitted`.
        fitted: of the groups that were fitted to inputs, the squared error of the outputs over that which rounding to
            nearest leaves; 0 where none were.
        digest: of the stored values; a merge that fitted them wrote down what they were.
        gain: <stored − base, delta> / <delta, delta> over the weights: 1 when the adapter is in them once; nan where
            nothing was merged.
        explained: (rows, out_features): what the error of the weights does to the given inputs.
        noise: (out_features,): what onnxruntime's kernel may add by rounding each group of the inputs to int8, as
            expected sum of squares over the rows.
    """

    worst: float
    fitted: float
    digest: str
    gain: float
    explained: Array
    noise: Array


def audit(
    graph: Graph, place: Place, linear: nn.Module, merged: AdaptedModule | None, x: Array, fitted: bool
) -> Audit | None:
    """Look at a quantized module's weight; None where it is not quantized.

    Args:
        graph: the exported model.
        place: of the module in it.
        linear: the base's layer in torch.
        merged: the blocks that should be in the stored weight; None: none.
        x: (rows, in_features) inputs.
        fitted: the codes under the blocks were chosen for the outputs, and so may be far from the weights.
    """
    found = [coded(graph, part.node) for part in place.parts]
    grids = [grid for grid in found if grid is not None]
    if len(grids) < len(found):
        return None
    base = linear.get_parameter("weight").detach().numpy()
    wanted = np.asarray(base.T if isinstance(linear, Conv1D) else base, np.float32)
    delta = _delta(merged) if merged is not None else None
    explained, worst, dot, norm = np.empty((len(x), len(wanted)), np.float32), 0.0, 0.0, 0.0
    met = _met(merged, grids[0].size) if fitted and merged is not None else None
    errors = np.zeros((2, len(wanted)))  # squares over the inputs, of what is stored and of rounding to nearest
    noise = np.empty(len(wanted))
    digest = ValuesDigest()
    first = 0  # the module's row where a part begins
    for part, grid in zip(place.parts, grids, strict=True):
        for start in range(*part.rows, _ROWS):
            stop = min(start + _ROWS, part.rows[1])
            rows = slice(first + start - part.rows[0], first + stop - part.rows[0])
            target = wanted[rows] if delta is None else wanted[rows] + delta[rows]
            stored = grid.rows(start, stop)
            digest.add(stored)
            error = stored - target
            noise[rows] = _noise(x, stored, grid.size)
            free = error if met is None else np.where(met[rows], 0, error)
            worst = max(worst, _worst(free, target, grid))
            if met is not None:
                nearest = _rounded(target, grid) - target
                for kind, one in enumerate((error, nearest)):
                    errors[kind, rows] = ((x @ np.where(met[rows], one, 0).T).astype(np.float64) ** 2).sum(0)
            explained[:, rows] = x @ error.T
            if delta is not None:
                dot += float((error.astype(np.float64) * delta[rows]).sum())
                norm += float((delta[rows].astype(np.float64) ** 2).sum())
        first += part.rows[1] - part.rows[0]
    fit = float(errors[0].sum() / (errors[1].sum() + 1e-30))
    return Audit(worst, fit, digest.hex(), 1 + dot / norm if norm else float("nan"), explained, noise)


def _met(module: AdaptedModule, size: int) -> npt.NDArray[np.bool_]:
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
    grouped = np.pad(target, ((0, 0), (0, -target.shape[1] % grid.size))).reshape(len(target), -1, grid.size)
    codes, scales, zeros = fresh_grid(grouped, grid.bits, not grid.has_zeros)
    values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    return np.asarray(values.reshape(len(target), -1)[:, : target.shape[1]], np.float32)


def _worst(error: Float32, target: Float32, grid: Coded) -> float:
    """The largest root mean square error of a group, in steps of the grid that suits the target."""
    size, bits = grid.size, grid.bits
    short = -target.shape[1] % size
    grouped, errors = (np.pad(a, ((0, 0), (0, short))).reshape(len(a), -1, size) for a in (target, error))
    spans = np.maximum(grouped.max(-1), 0) - np.minimum(grouped.min(-1), 0)  # (rows, groups)
    if not grid.has_zeros:
        spans = 2 * np.abs(grouped).max(-1)
    steps = spans / (2**bits - 1)
    steps = np.maximum(steps, 1e-3 * steps.mean() + 1e-30)  # an empty group has no grid of its own
    lengths = np.full(grouped.shape[1], size)
    lengths[-1] -= short
    rms = np.sqrt((errors.astype(np.float64) ** 2).sum(-1) / lengths)
    return float((rms / steps).max())


def _noise(x: Array, weight: Float32, size: int) -> Array:
    """Of inputs rounded to 255 steps between ± the largest of each group: step² / 12 for each, times weight²."""
    short = -x.shape[1] % size
    grouped, weights = (np.pad(a, ((0, 0), (0, short))).reshape(len(a), -1, size) for a in (x, weight))
    steps = np.abs(grouped).max(-1).astype(np.float64) / 127  # (rows, groups)
    found: Array = np.einsum("jgk,jgk->jg", weights, weights) @ ((steps**2).sum(0) / 12)
    return found
