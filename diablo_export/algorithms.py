"""Other programs' ways to round a whole weight, and GPTQ: for models that are merged in float and then quantized.

    k_quant  scale and zero point searched for the least error, large weights counting more (llama.cpp's)
    hqq      zero points between the codes, for the least error in a norm that forgives outliers (Half-Quadratic
             Quantization, Badri and Shaji 2023)
    gptq     column after column, each rounding error pushed into the columns that are not rounded yet, by the inverse
             of the inputs' second moments (arXiv 2210.17323)
    learned  begins as gptq does; codes and scales are trained in the file (`trainer.rounding`)

The first two are onnxruntime's own code, and give its codes bit for bit. Its GPTQ gives values, not codes, and rounds
them once more on another grid; the one here keeps the codes that it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from diablo_export.errors import require
from diablo_export.quantization import Codes, Float32, Quantized, fresh_grid, pack
from diablo_export.requantize import Grid, grouped, refitted

LEARNED = "learned"
ALGORITHMS = ("k_quant", "hqq", "gptq", LEARNED)
HAVE_ZEROS = ("k_quant", "hqq")  # with zero points whatever is asked for
_AT_ONCE = 1 << 22  # weights: temporaries of a dozen times that stay small
_DAMPING = 0.01  # of the moments' mean diagonal, added to it
_COLUMNS = 128  # that GPTQ rounds before it moves the rest


@dataclass(frozen=True)
class Algorithm:
    """One way to quantize every weight of a model.

    Attributes:
        name: one of ALGORITHMS.
        moments: for gptq and learned, E[x xᵀ] of a module's inputs, (in_features, in_features), by module path.
    """

    name: str
    moments: Callable[[str], Float32] | None = None

    def kind(self, symmetric: bool) -> tuple[bool, bool]:
        """Whether there are no zero points, and whether those that there are lie between the codes."""
        return symmetric and self.name not in HAVE_ZEROS, self.name == "hqq"

    def quantize(self, module: str, bits: int, group_size: int, symmetric: bool, weight: Float32) -> Quantized:
        """A module's weight (out_features, in_features), or some of its rows, as MatMulNBits stores it."""
        grid = self.grid(module, bits, group_size, symmetric, weight)
        zeros: Any = None
        if not grid.symmetric:
            zeros = grid.zeros if grid.between else pack(grid.zeros, bits, fill=2 ** (bits - 1))
        return Quantized(pack(grid.codes, bits), grid.scales, zeros, bits, group_size, weight.shape[1])

    def grid(self, module: str, bits: int, group_size: int, symmetric: bool, weight: Float32) -> Grid:
        """The same, unpacked: (out_features, groups, group_size)."""
        if self.name in ("gptq", LEARNED):
            assert self.moments is not None
            return gptq(weight, bits, group_size, symmetric, self.moments(module))
        rows = max(1, _AT_ONCE // weight.shape[1])
        choose = {"k_quant": _k_quant, "hqq": _hqq}[self.name]
        return Grid.joined([choose(weight[at : at + rows], bits, group_size) for at in range(0, len(weight), rows)])


def gptq(weight: Float32, bits: int, group_size: int, symmetric: bool, moments: Float32) -> Grid:
    """GPTQ: codes that keep the layer's output, for inputs with these second moments.

    Args:
        weight: (out_features, in_features).
        bits: of a code.
        group_size: a group's grid is fitted to its weights when its first column's turn comes.
        symmetric: no zero points.
        moments: (in_features, in_features).
    """
    target = grouped(weight, group_size)  # (out, groups, size)
    out, groups, size = target.shape
    values = target.reshape(out, -1).astype(np.float32, copy=True)
    upper = _inverse_factor(moments, groups * size)
    codes = np.zeros((out, groups * size), np.uint8)
    scales, zeros = np.zeros((out, groups), np.float32), np.zeros((out, groups), np.uint8)
    step = max(size, _COLUMNS // size * size)
    for first in range(0, groups * size, step):
        last = min(first + step, groups * size)
        errors = np.zeros((out, last - first), np.float32)
        for column in range(first, last):
            if column % size == 0:
                here = _fitted(values[:, None, column : column + size], bits, symmetric)
                scales[:, column // size], zeros[:, column // size] = here.scales[:, 0], here.zeros[:, 0]
            scale, zero = scales[:, column // size], zeros[:, column // size]
            usable = np.where(scale == 0, np.float32(np.inf), scale)
            codes[:, column] = np.clip(np.rint(values[:, column] / usable + zero), 0, 2**bits - 1)
            rounded = (codes[:, column].astype(np.float32) - zero) * scale
            error = (values[:, column] - rounded) / upper[column, column]
            values[:, column + 1 : last] -= error[:, None] * upper[column, column + 1 : last]
            errors[:, column - first] = error
        values[:, last:] -= errors @ upper[first:last, last:]
    return Grid(codes.reshape(target.shape), scales, zeros, bits, symmetric)


def _fitted(group: Float32, bits: int, symmetric: bool) -> Grid:
    """A grid for one group of each row, its scale searched for."""
    codes, scales, zeros = fresh_grid(group, bits, symmetric)
    return refitted(group, Grid(codes, scales, zeros, bits, symmetric))


def _inverse_factor(moments: Float32, columns: int) -> Float32:
    """U of the damped moments' inverse, UᵀU; inputs that are padding move nothing."""
    wide = np.zeros((columns, columns))
    wide[: len(moments), : len(moments)] = moments
    mean = max(float(np.diag(moments).mean()), 1e-12)
    wide[np.diag_indices(columns)] += _DAMPING * mean
    return np.asarray(np.linalg.cholesky(np.linalg.inv(wide)).T, np.float32)


def _k_quant(weight: Float32, bits: int, size: int) -> Grid:
    quantizer: Any = require("onnxruntime.quantization.neural_compressor.weight_only", "cpu")
    target = grouped(weight, size)
    with np.errstate(divide="ignore", invalid="ignore"):  # where all weights of a group are one
        codes, scales, zeros = quantizer.quant_tensor_k_quant_cpu(target.reshape(-1, size), bits, size)
    shape = target.shape[:2]
    unpacked: Codes = codes.astype(np.uint8).reshape(target.shape)
    return Grid(unpacked, scales.astype(np.float32).reshape(shape), zeros.astype(np.uint8).reshape(shape), bits, False)


def _hqq(weight: Float32, bits: int, size: int) -> Grid:
    quantizers: Any = require("onnxruntime.quantization.matmul_nbits_quantizer", "cpu")
    torch: Any = require("torch", "train")
    quantizer = quantizers.HQQWeightOnlyQuantizer(quantizers.HQQWeightOnlyQuantConfig(block_size=size, bits=bits))
    given = torch.from_numpy(np.array(weight, np.float32))
    codes, scales, zeros = (part.numpy() for part in quantizer.quantize_internal(given, bits=bits, group_size=size))
    return Grid(codes.astype(np.uint8).reshape(len(weight), -1, size), scales, zeros, bits, False)
