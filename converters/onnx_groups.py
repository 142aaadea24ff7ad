"""The quantized weight of one module as its ONNX nodes hold it: read whole, and written back where a block meets it.

A module lies in one node, in some rows of a fused one, or in several. Only touched groups are written, within the
bytes of the initializers; everything else in the file stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.converters.onnx_linears import Linear, numpy_of
from diablo_export.converters.onnx_match import Match
from diablo_export.converters.onnx_stored import Dequantized, keep, writable
from diablo_export.errors import ExportError
from diablo_export.quantization import pack, unpack
from diablo_export.requantize import Grid


@dataclass(frozen=True)
class Corner:
    """Where one block meets one node's weight.

    Attributes:
        rows: of the node's weight.
        columns: inputs that the block reads.
        delta: (rows, columns), what the block adds.
        of_module: the same rows, counted in the module.
    """

    rows: slice
    columns: slice
    delta: Array
    of_module: slice

    def groups(self, size: int) -> slice:
        """The groups of `size` inputs that the block meets."""
        return slice(self.columns.start // size, -(-self.columns.stop // size))


def corners(one: Match) -> Iterator[tuple[Linear, list[Corner]]]:
    """Per node of the module, where its blocks fall in that node's weight."""
    offset = 0  # of the piece's first row among the module's
    for piece in one.pieces:
        size = piece.stop - piece.start
        found = []
        for block, (inputs, outputs) in enumerate(one.module.shape.slices()):
            start, stop = max(outputs.start, offset), min(outputs.stop, offset + size)
            if start >= stop or inputs.start >= inputs.stop:
                continue
            columns = slice(start - outputs.start, stop - outputs.start)
            delta = one.module.blocks[block, : inputs.stop - inputs.start, columns].T.astype(np.float32)
            move = piece.start - offset
            found.append(Corner(slice(start + move, stop + move), inputs, delta, slice(start, stop)))
        yield piece.linear, found
        offset += size


def quantized(one: Match) -> bool:
    """Whether the module's weight is quantized in the graph.

    Raises:
        ExportError: its nodes hold it in different grids.
    """
    kinds = {(piece.linear.bits, piece.linear.group_size, piece.linear.zero_points is None) for piece in one.pieces}
    if len(kinds) > 1:
        said = "; ".join(
            f"{p.linear.name}: {p.linear.bits} bits in groups of {p.linear.group_size}" for p in one.pieces
        )
        raise ExportError(f"{one.module.name} lies in nodes of different grids, which cannot be merged as one: {said}")
    return bool(one.pieces[0].linear.bits)


def scale_type(one: Match) -> Any:
    """The numpy dtype that the module's scales are stored in."""
    scales = one.pieces[0].linear.scales
    assert scales is not None
    return numpy_of(scales).dtype


def opened(linear: Linear, folder: Path) -> Stored | Dequantized:
    """A node's quantized weight, to be read and written group by group; `folder` is where its model.onnx lies."""
    return Stored(linear, folder) if linear.layout == "MatMulNBits" else Dequantized(linear, folder)


class Stored:
    """A node's quantized weight, opened for reading and writing group by group."""

    def __init__(self, linear: Linear, folder: Path) -> None:
        """Map the initializers of a MatMulNBits node; `folder` is where its model.onnx lies."""
        assert linear.scales is not None
        self._values = linear.stored
        self._arrays = [writable(value, folder) for value in self._values]
        self._bits, self._size = linear.bits, linear.group_size
        self._inputs = linear.in_features
        self._groups = -(-linear.in_features // linear.group_size)
        self._codes = self._arrays[0].reshape(linear.out_features, self._groups, -1)
        self._scales = self._arrays[1].reshape(linear.out_features, self._groups)
        self._zeros = self._arrays[2].reshape(linear.out_features, -1) if len(self._arrays) > 2 else None
        self._between = self._zeros is not None and self._zeros.dtype != np.uint8  # zero points are floats

    def part(self, rows: slice, groups: slice) -> Grid:
        """A copy of some rows and groups; what pads the last one is worth 0, whatever its bytes say."""
        scales = self._scales[rows, groups].astype(np.float32)
        zeros: Array = np.full(scales.shape, 2 ** (self._bits - 1), np.uint8)
        if self._zeros is not None and self._between:
            zeros = self._zeros[rows, groups].astype(np.float32)
        elif self._zeros is not None:
            zeros = unpack(np.array(self._zeros[rows]), self._bits, self._groups)[:, groups]
        codes = unpack(np.array(self._codes[rows, groups]), self._bits, self._size)
        nothing = np.repeat(np.clip(np.rint(zeros), 0, 2**self._bits - 1), self._size, 1)
        self._past_the_end(codes, groups)[:] = self._past_the_end(nothing, groups)
        return Grid(codes, scales, zeros, self._bits, self._zeros is None)

    def put(self, rows: slice, groups: slice, grid: Grid) -> None:
        """Write some rows and groups; all others stay, and so does what pads the last one."""
        codes, before = grid.codes.copy(), unpack(np.array(self._codes[rows, groups]), self._bits, self._size)
        self._past_the_end(codes, groups)[:] = self._past_the_end(before, groups)
        self._codes[rows, groups] = pack(codes, self._bits)
        self._scales[rows, groups] = grid.scales.astype(self._scales.dtype)
        if self._zeros is not None and self._between:
            self._zeros[rows, groups] = grid.zeros.astype(self._zeros.dtype)
        elif self._zeros is not None:
            stored = self._zeros[rows]
            points = unpack(np.array(stored), self._bits, self._groups)
            points[:, groups] = grid.zeros
            packed = pack(points, self._bits)
            # the bytes' spare bits at a row's end stay as they were
            whole = self._groups * self._bits // 8
            packed[:, whole:] |= stored[:, whole:] & np.uint8(0xFF << (self._groups * self._bits % 8) & 0xFF)
            self._zeros[rows] = packed

    def _past_the_end(self, codes: Array, groups: slice) -> Array:
        """The part of `codes` of these groups (rows, …) that lies past the layer's last input, as a view."""
        return codes.reshape(len(codes), -1)[:, self._inputs - groups.start * self._size :]

    def close(self) -> None:
        """Have what was put reach the file, or the graph."""
        for value, array in zip(self._values, self._arrays, strict=True):
            keep(value, array)


def read(one: Match, folder: Path) -> Grid:
    """The module's grid, (out, groups, size)."""
    parts = [opened(piece.linear, folder).part(slice(piece.start, piece.stop), slice(0, None)) for piece in one.pieces]
    codes, scales, zeros = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")
    )
    return Grid(codes, scales, zeros, parts[0].bits, parts[0].symmetric)


def write(one: Match, grid: Grid, folder: Path) -> int:
    """Write a module's grid where a block meets it; returns how many groups that were."""
    count = 0
    for linear, found in corners(one):
        stored = opened(linear, folder)
        for corner in found:
            groups = corner.groups(linear.group_size)
            stored.put(corner.rows, groups, grid.part(corner.of_module, groups))
            count += (corner.rows.stop - corner.rows.start) * (groups.stop - groups.start)
        stored.close()
    return count
