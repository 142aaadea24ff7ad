"""The maths of DiaBlo in numpy: y = y0 + x · blockdiag(D_1 … D_N), and what it means for a weight.

`blocks` is D, shape (num_blocks, block_size_in, block_size_out). Block i reads inputs
[i·block_size_in, (i+1)·block_size_in) and writes outputs [i·block_size_out, (i+1)·block_size_out). Where the
sizes do not divide, the input is taken as zero-padded at its tail and the output is cropped, as in the
paper's own layer (DiaBlo, arXiv 2506.03230). This is the slow obvious reference: the torch layer, the ONNX
function body and every kernel are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BlockShape:
    """How the blocks of one linear layer lie: its sizes, and those of its padded blocks."""

    in_features: int
    out_features: int
    num_blocks: int
    block_size_in: int
    block_size_out: int

    @classmethod
    def for_linear(cls, in_features: int, out_features: int, num_blocks: int) -> BlockShape:
        """Blocks of a (out_features, in_features) weight for the asked `num_blocks`.

        Sizes are rounded up, so the effective count can be smaller than asked: 7 → 7 with N = 4 has blocks
        of 2 × 2 and 4 of them, 9 → 9 with N = 6 blocks of 2 × 2 and 5 of them.

        Raises:
            InputError: `num_blocks` is below 1 or above either dimension.
        """
        limit = min(in_features, out_features)
        if not 1 <= num_blocks <= limit:
            raise InputError(
                f"num_blocks is {num_blocks}, but a layer of {in_features} inputs and {out_features} outputs "
                f"takes 1 to {limit}; choose a smaller num_blocks or leave this module out"
            )
        size_in, size_out = -(-in_features // num_blocks), -(-out_features // num_blocks)
        effective = max(-(-in_features // size_in), -(-out_features // size_out))
        return cls(in_features, out_features, effective, size_in, size_out)

    def __post_init__(self) -> None:
        if self.num_blocks * self.block_size_in < self.in_features:
            raise InputError(self._misfit("in_features", self.block_size_in, self.in_features))
        if self.num_blocks * self.block_size_out < self.out_features:
            raise InputError(self._misfit("out_features", self.block_size_out, self.out_features))

    def _misfit(self, side: str, size: int, features: int) -> str:
        return (
            f"blocks of shape {self.blocks} cover {self.num_blocks} × {size} = {self.num_blocks * size} "
            f"positions, but the module's {side} is {features}; the adapter belongs to another module or model"
        )

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Shape of the blocks tensor: (num_blocks, block_size_in, block_size_out)."""
        return (self.num_blocks, self.block_size_in, self.block_size_out)

    @property
    def covered_outputs(self) -> int:
        """How many outputs some block can change; fewer than `out_features` when sizes divide badly."""
        live = -(-self.in_features // self.block_size_in)  # blocks that meet at least one input
        return min(self.out_features, live * self.block_size_out)

    @property
    def live_parameters(self) -> int:
        """How many stored block entries meet a real weight; the rest is padding."""
        return sum((i.stop - i.start) * (o.stop - o.start) for i, o in self.slices())

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """The (inputs, outputs) that each block meets, cropped; both empty for a block that is all padding."""
        for block in range(self.num_blocks):
            start_in, start_out = block * self.block_size_in, block * self.block_size_out
            stop_in = min(start_in + self.block_size_in, self.in_features)
            stop_out = min(start_out + self.block_size_out, self.out_features)
            yield (
                slice(min(start_in, stop_in), stop_in),
                slice(min(start_out, stop_out), stop_out),
            )


def shape_of(blocks: Array, in_features: int, out_features: int) -> BlockShape:
    """The BlockShape of a blocks tensor on a module of these sizes.

    Raises:
        InputError: `blocks` is not 3-D, or does not cover the module.
    """
    if blocks.ndim != 3:
        raise InputError(f"blocks have shape {blocks.shape}; they must be (num_blocks, block_size_in, block_size_out)")
    return BlockShape(in_features, out_features, *blocks.shape)


def apply(x: Array, blocks: Array, out_features: int, y0: Array | None = None) -> Array:
    """y0 + x · blockdiag(blocks).

    Args:
        x: (…, in_features).
        blocks: (num_blocks, block_size_in, block_size_out); an empty tensor means no adapter.
        out_features: the width of the output.
        y0: (…, out_features), or None for zeros.
    """
    y = np.zeros((*x.shape[:-1], out_features), x.dtype) if y0 is None else np.array(y0)
    if blocks.size == 0:
        return y
    shape = shape_of(blocks, x.shape[-1], out_features)
    for block, (inputs, outputs) in enumerate(shape.slices()):
        piece = blocks[block, : inputs.stop - inputs.start, : outputs.stop - outputs.start]
        y[..., outputs] += x[..., inputs] @ piece
    return y


def dense(blocks: Array, in_features: int, out_features: int) -> Array:
    """blockdiag(blocks), cropped to (in_features, out_features)."""
    full = np.zeros((in_features, out_features), blocks.dtype)
    for block, (inputs, outputs) in enumerate(shape_of(blocks, in_features, out_features).slices()):
        full[inputs, outputs] = blocks[block, : inputs.stop - inputs.start, : outputs.stop - outputs.start]
    return full


def under_blocks(weight: Array, shape: BlockShape) -> Array:
    """The entries of (out_features, in_features) that each block meets, as blocks; 0 in padding."""
    found = np.zeros(shape.blocks, weight.dtype)
    for block, (inputs, outputs) in enumerate(shape.slices()):
        found[block, : inputs.stop - inputs.start, : outputs.stop - outputs.start] = weight[outputs, inputs].T
    return found


def add_to_weight(weight: Array, blocks: Array, sign: int = 1) -> Array:
    """A copy of weight (out_features, in_features) plus sign · blockdiag(blocks)ᵀ, rounded once to its dtype.

    Only the entries that a block meets are computed; every other one is copied bit for bit. The sum is taken
    in float32, or float64 where either side is float64.
    """
    out_features, in_features = weight.shape
    merged = np.array(weight)
    wide = np.float64 if np.float64 in (weight.dtype, blocks.dtype) else np.float32
    for block, (inputs, outputs) in enumerate(shape_of(blocks, in_features, out_features).slices()):
        piece = blocks[block, : inputs.stop - inputs.start, : outputs.stop - outputs.start]
        total: Array = merged[outputs, inputs].astype(wide)  # (outputs, inputs)
        total += sign * piece.T.astype(wide)
        merged[outputs, inputs] = total.astype(weight.dtype)
    return merged
