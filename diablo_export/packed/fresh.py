"""A float weight quantized anew for a GPTQ checkpoint, its codes chosen in one of four ways.

    rtn         to the nearest, as onnxruntime quantizes by default
    refit       scales searched and fitted for the least squared error of the weights; needs no text
    gptq        column after column, each rounding error pushed into the columns that follow
    calibrated  coordinate descent on the error of the layer's output, scales fitted between the sweeps

Scales are float16, as programs that read the format expect.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diablo_export.algorithms import gptq
from diablo_export.blockdiag import Array
from diablo_export.packed import gptq as codec
from diablo_export.packed.grid import PackedGrid
from diablo_export.quantization import Float32
from diablo_export.requantize import Grid, calibrated, grouped, nearest, refitted, rounded, ungrouped

METHODS = ("calibrated", "gptq", "refit", "rtn")
FITTED = ("calibrated", "gptq")  # to the second moments of a layer's inputs
_AT_ONCE = 1 << 22  # weights: a few dozen temporaries of their size stay small
_WORD = 32  # bits of an integer that codes are packed into


def config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The quantization_config of a checkpoint whose weights are `tensors`."""
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": symmetric,
        "lm_head": False, "checkpoint_format": "gptq_v2",
    }  # fmt: skip


def fault(shape: tuple[int, int], bits: int) -> str | None:
    """Why the format cannot hold a weight (out_features, in_features), or None."""
    odd = [f"{size} {name}" for size, name in zip(shape, ("outputs", "inputs"), strict=True) if size * bits % _WORD]
    return f"{' and '.join(odd)} at {bits} bits are no whole words of GPTQ's format" if odd else None


def quantized(
    weight: Float32, bits: int, group_size: int, symmetric: bool, method: str, moments: Float32 | None = None
) -> PackedGrid:
    """A weight (out_features, in_features) on a grid of its own.

    Args:
        weight: float.
        bits: 2, 4 or 8.
        group_size: inputs that share a scale.
        symmetric: no zero points but the middle.
        method: one of METHODS.
        moments: E[x xᵀ] of the inputs, (in_features, in_features), for those of FITTED.
    """
    # GPTQ inverts the moments each time that it is called, and takes little memory beside them
    rows = len(weight) if method == "gptq" else max(1, _AT_ONCE // weight.shape[1])
    grid = Grid.joined([
        _chosen(weight[at : at + rows], bits, group_size, symmetric, method, moments)
        for at in range(0, len(weight), rows)
    ])
    inputs = weight.shape[1]
    codes, zeros = ungrouped(grid.codes, inputs), grid.zeros.astype(np.uint8)
    return PackedGrid(codes, grid.scales, zeros, np.arange(inputs) // group_size, bits, np.float16)


def tensors(grid: PackedGrid, config: dict[str, Any]) -> dict[str, Array]:
    """A module's tensors, by what follows its name."""
    made = codec.packed(grid, {"scales": np.empty(0, np.float16)}, config)
    return {**made, "g_idx": grid.group_of.astype(np.int32)}


def _chosen(weight: Float32, bits: int, size: int, symmetric: bool, method: str, moments: Float32 | None) -> Grid:
    if method == "gptq":
        assert moments is not None
        return gptq(weight, bits, size, symmetric, moments).stored_as(np.float16)
    target = grouped(weight, size)
    middle = np.full(target.shape[:2], 2 ** (bits - 1), np.uint8)
    like = Grid(np.zeros(target.shape, np.uint8), np.ones(target.shape[:2], np.float32), middle, bits, symmetric)
    start = rounded(target, like).stored_as(np.float16)
    if method == "rtn":
        return nearest(target, start)
    fitted = refitted(target, start, np.float16)
    if method == "refit":
        return fitted
    assert moments is not None
    short = target.shape[1] * size - len(moments)
    return calibrated(target, [start, fitted], np.pad(moments, (0, short)), np.float16)
