"""How a model is fed a module's blocks: the names of its inputs, blocks as int8 with scales, sums of several blocks.

numpy alone: what a device needs to read, check and add up `.onnx_adapter` files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array
from diablo_export.errors import InputError

BLOCKS_SUFFIX = ".diablo_blocks"  # of the input that feeds a module's D
SCALES_SUFFIX = ".diablo_scales"  # of the one that feeds its S, where D is int8
BASE_KEY = "diablo.base"  # metadata of a model: the SHA-256 of the base that it was made from, in hex
MARKED = 0x44424C01  # an .onnx_adapter's adapter_version when its model_version is `base_mark` of its base
# ‖stored − wanted‖ / ‖wanted‖ of a module's blocks that is worth a warning: an error wholly along the blocks would take
# a survival gain of 1 to the limit that parity sets for branches
MOST_ERROR = 0.02
_LARGEST = 127  # of the codes: −128 stays unused, so that the grid is symmetric

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]


def base_mark(sha256: str) -> int:
    """The 31 bits of a base's SHA-256 that fit into an .onnx_adapter: its first eight hex digits, the top bit off.

    They tell bases from each other (one pair in two thousand million looks alike), not forgeries.

    Raises:
        InputError: not a SHA-256 in hex.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InputError(f"{BASE_KEY} is {sha256!r}; it must be a SHA-256 in 64 lower-case hex digits")
    return int(sha256[:8], 16) & 0x7FFFFFFF


def to_int8(blocks: Array) -> tuple[Int8, Float32]:
    """Blocks (num_blocks, block_size_in, block_size_out) as codes of that shape and scales (num_blocks,).

    A scale is the largest absolute value of its block, divided by 127 in float32; a code is the value divided by
    the scale, rounded to the nearest integer, ties to even. A block of zeros has the scale 0.
    """
    wide = np.asarray(blocks, np.float32)
    scales: Float32 = np.abs(wide).max((1, 2), initial=0) / np.float32(_LARGEST)
    steps = np.where(scales == 0, 1, scales)[:, None, None]  # what is too small for a scale is nothing beside 1
    codes = np.clip(np.rint(wide / steps), -_LARGEST, _LARGEST)
    return codes.astype(np.int8), scales


def from_int8(codes: Array, scales: Array) -> Float32:
    """The blocks that codes (num_blocks, …) and scales (num_blocks,) stand for."""
    wide: Float32 = codes.astype(np.float32) * np.asarray(scales, np.float32).reshape(-1, 1, 1)
    return wide


def relative_error(wanted: Array, stored: Array) -> float:
    """‖stored − wanted‖ / ‖wanted‖ over all entries; 0 where both are zero."""
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    miss = float(np.linalg.norm(stored.astype(np.float64) - wanted.astype(np.float64)))
    return miss / size if size else miss


def add(parts: Sequence[tuple[Array, float]]) -> Float32:
    """Σ weight · blocks of one module, in float32, as the fewest blocks that hold it: blocks add exactly.

    Empty blocks add nothing. Where the counts differ, finer blocks are laid into the coarser ones.

    Raises:
        InputError: finer blocks that cross the boundaries of the coarser ones: the sum is not block-diagonal.
    """
    filled = [(blocks, weight) for blocks, weight in parts if blocks.size]
    if not filled:
        return np.zeros((0, 0, 0), np.float32)
    coarse = min((blocks.shape for blocks, _ in filled), key=lambda shape: shape[0])
    total: Float32 = np.zeros(coarse, np.float32)
    for blocks, weight in filled:
        _lay_into(total, np.asarray(blocks, np.float32) * np.float32(weight))
    return total


def _lay_into(total: Float32, blocks: Float32) -> None:
    """Add blocks to those of `total` that they lie in."""
    if blocks.shape == total.shape:
        total += blocks
        return
    (count, height, width), (_, size_in, size_out) = total.shape, blocks.shape
    for index, block in enumerate(blocks):
        start_in, start_out = index * size_in, index * size_out
        if start_in >= count * height or start_out >= count * width:
            continue  # all padding: `total` covers the module, and this begins behind its end
        row, column = start_in // height, start_out // width
        top, left = start_in - row * height, start_out - column * width
        if row != column or top + size_in > height or left + size_out > width:
            raise InputError(
                f"blocks of shapes {total.shape} and {blocks.shape} cannot be summed: block {index} of the finer ones "
                "lies in no block of the coarser ones; sum adapters whose block counts divide each other, and the "
                "module's sizes"
            )
        total[row, top : top + size_in, left : left + size_out] += block
