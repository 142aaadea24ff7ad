"""Group-wise 2, 4 and 8-bit weights in the layout of ONNX Runtime's MatMulNBits.

W[n, k] = (code[n, k] − zero_point[n, g]) · scale[n, g], g = k // group_size (operator spec:
com.microsoft in onnxruntime's ContribOperators.md). `quantize` gives, bit for bit, what
onnxruntime's default quantizer gives (`quantize_matmul_{2,4,8}bits`, MLAS block-wise quantization along the
input dimension); a test holds that on every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diablo_export.errors import InputError

BITS = (2, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)
_ROWS_AT_ONCE = 1 << 20  # weights per step: the temporaries of one step stay in the processor's cache

Float32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Quantized:
    """One weight (out_features, in_features) as MatMulNBits stores it; in_features is padded to whole groups."""

    codes: Codes  # (out_features, groups, group_size · bits / 8): low bits first
    scales: Float32  # (out_features, groups)
    zero_points: Codes | None  # (out_features, ⌈groups · bits / 8⌉): low bits first; None: 2^(bits − 1)
    bits: int
    group_size: int
    in_features: int

    def __post_init__(self) -> None:
        out_features, groups = self.scales.shape
        wanted = (out_features, groups, self.group_size * self.bits // 8)
        if self.codes.shape != wanted or groups != -(-self.in_features // self.group_size):
            raise InputError(
                f"codes {self.codes.shape} and scales {self.scales.shape} do not fit in_features {self.in_features} at "
                f"{self.bits} bits in groups of {self.group_size}; codes must be {wanted}"
            )


def check_layout(bits: int, group_size: int) -> None:
    """Refuse bit widths and group sizes that MatMulNBits does not have.

    Raises:
        InputError: names both and what is allowed.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise InputError(
            f"{bits} bits in groups of {group_size}: bits must be one of {BITS}, the group size one of {GROUP_SIZES}"
        )


def fitting_group(group_size: int, widths: Iterable[int]) -> int | None:
    """The largest group of at most this size that divides all the widths, as experts in few bits want it."""
    wanted = (
        size for size in reversed(GROUP_SIZES) if size <= group_size and not any(width % size for width in widths)
    )
    return next(wanted, None)


def quantize(weight: Float32, bits: int = 4, group_size: int = 32, symmetric: bool = True) -> Quantized:
    """Round each group of a weight (out_features, in_features) to its own grid, as onnxruntime does by default.

    Symmetric: scale = v / −2^(bits−1), where v is the group's value of largest magnitude. Asymmetric: the
    grid spans [min(w, 0), max(w, 0)].

    Raises:
        InputError: bits or group size that MatMulNBits does not have; NaN or inf in the weight.
    """
    check_layout(bits, group_size)
    out_features, in_features = weight.shape
    groups = -(-in_features // group_size)
    codes = np.empty((out_features, groups, group_size * bits // 8), np.uint8)
    scales = np.empty((out_features, groups), np.float32)
    zeros = None if symmetric else np.empty((out_features, -(-groups * bits // 8)), np.uint8)
    step = max(1, _ROWS_AT_ONCE // (groups * group_size))
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        integers, scales[rows], zero = fresh_grid(_grouped(weight[rows], groups, group_size), bits, symmetric)
        _blank_padding(integers, in_features)
        codes[rows] = pack(integers, bits)
        if zeros is not None:
            zeros[rows] = pack(zero, bits, fill=2 ** (bits - 1))
    return Quantized(codes, scales, zeros, bits, group_size, in_features)


def fresh_grid(grouped: Float32, bits: int, symmetric: bool) -> tuple[Codes, Float32, Codes]:
    """Each group of (rows, groups, size) rounded to its own grid, as `quantize` does, whatever its size.

    Returns:
        Codes (rows, groups, size), scales and zero points (rows, groups).

    Raises:
        InputError: NaN or inf among the weights.
    """
    scale, reciprocal, zero = _grid(grouped, bits, symmetric)
    integers = np.clip(_round(grouped * reciprocal[..., None] + zero[..., None]), 0, 2**bits - 1)
    return integers.astype(np.uint8), scale, zero.astype(np.uint8)


def dequantize(quantized: Quantized) -> Float32:
    """The weight (out_features, in_features) that the codes stand for."""
    zeros = zero_points(quantized)  # (out, groups)
    codes = unpack(quantized.codes, quantized.bits, quantized.group_size)  # (out, groups, group_size)
    values = (codes.astype(np.float32) - zeros[..., None].astype(np.float32)) * quantized.scales[..., None]
    return values.reshape(len(values), -1)[:, : quantized.in_features]


def zero_points(quantized: Quantized) -> Codes:
    """One zero point per group, unpacked: (out_features, groups)."""
    groups = quantized.scales.shape[1]
    if quantized.zero_points is None:
        return np.full(quantized.scales.shape, 2 ** (quantized.bits - 1), np.uint8)
    return unpack(quantized.zero_points, quantized.bits, groups)


def pack(values: Codes, bits: int, fill: int = 0) -> Codes:
    """Pack the last axis, low bits first; its length is padded with `fill` to whole bytes."""
    per_byte = 8 // bits
    short = -values.shape[-1] % per_byte
    if short:
        values = np.concatenate([values, np.full((*values.shape[:-1], short), fill, np.uint8)], axis=-1)
    packed = values[..., 0::per_byte].copy()
    for position in range(1, per_byte):
        packed |= values[..., position::per_byte] << (position * bits)
    return packed


def unpack(packed: Codes, bits: int, length: int) -> Codes:
    """Undo `pack`: the last axis comes back with `length` entries."""
    per_byte = 8 // bits
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for position in range(per_byte):
        values[..., position::per_byte] = (packed >> (position * bits)) & (2**bits - 1)
    return values[..., :length]


def _grouped(rows: Float32, groups: int, group_size: int) -> Float32:
    short = groups * group_size - rows.shape[1]
    if short:
        rows = np.pad(rows, ((0, 0), (0, short)))
    return rows.astype(np.float32, copy=False).reshape(len(rows), groups, group_size)


def _grid(grouped: Float32, bits: int, symmetric: bool) -> tuple[Float32, Float32, Float32]:
    """Scale, its reciprocal and zero point of each group, in MLAS's order of float32 operations."""
    top = np.float32(2**bits - 1)
    largest, smallest = grouped.max(-1), grouped.min(-1)
    if not (np.isfinite(largest) & np.isfinite(smallest)).all():
        raise InputError("a weight to be quantized holds NaN or inf; check the model and the adapter")
    if symmetric:
        middle = np.float32(2 ** (bits - 1))
        extreme = np.where(np.abs(largest) > np.abs(smallest), largest, smallest)
        scale = extreme / -middle
        return scale, _reciprocal(scale), np.full_like(scale, middle)
    largest, smallest = np.maximum(largest, 0), np.minimum(smallest, 0)
    scale = (largest - smallest) / top
    zero = np.divide(-smallest, scale, out=np.zeros_like(scale), where=scale != 0)
    return scale, _reciprocal(scale), np.clip(_round(zero), 0, top)


def _round(values: Float32) -> Float32:
    """C's roundf for values above −0.5: halves go up, where numpy's rint would take them to even."""
    down = np.floor(values)
    return down + (values - down >= np.float32(0.5))


def _reciprocal(scale: Float32) -> Float32:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _blank_padding(integers: Codes, in_features: int) -> None:
    """Codes past in_features are 0, as onnxruntime leaves them."""
    rows = integers.reshape(len(integers), -1)
    rows[:, in_features:] = 0
