"""The quantized weight of one module as its ONNX nodes hold it: read whole, and written back where a block meets it.

A module lies in one node, in some rows of a fused one, or in several. Only touched groups are written, within the
bytes of the initializers; everything else in the file stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array
from diablo_export.converters.onnx_linears import Linear, numpy_of
from diablo_export.converters.onnx_match import Match
from diablo_export.converters.onnx_stored import Dequantized, Held, Index, keep, writable
from diablo_export.errors import ExportError
from diablo_export.quantization import Float32, pack, unpack
from diablo_export.requantize import Grid

_AT_ONCE = 1 << 20  # weights: many small blocks cost one call together, and a large one little memory


@dataclass(frozen=True)
class Corner:
    """Where one block meets one node's weight.

    Attributes:
        rows: of the node's weight.
        columns: inputs that the block reads.
        delta: (rows, columns), what the block adds, in the blocks' dtype.
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
            delta = one.module.blocks[block, : inputs.stop - inputs.start, columns].T
            move = piece.start - offset
            found.append(Corner(slice(start + move, stop + move), inputs, delta, slice(start, stop)))
        yield piece.linear, found
        offset += size


def touched(found: Sequence[Corner], size: int) -> Iterator[tuple[Index, Index, Float32]]:
    """The groups of `size` inputs that blocks meet, of many rows at once.

    Yields:
        rows (rows, 1) and groups (rows, width) of the node's weight, and what blocks add, (rows, width, size).
    """
    alike = defaultdict(list)
    for corner in found:
        groups = corner.groups(size)
        alike[groups.stop - groups.start].append(corner)
    for width, corners in alike.items():
        heights = np.array([len(corner.delta) for corner in corners])
        tops = heights.cumsum() - heights  # of each corner among the rows of all
        rows = np.arange(heights.sum()) + np.repeat([corner.rows.start for corner in corners] - tops, heights)
        firsts = np.repeat([corner.columns.start // size for corner in corners], heights)
        added = np.zeros((len(rows), width * size), np.float32)
        for corner, top in zip(corners, tops.tolist(), strict=True):
            height, columns = corner.delta.shape
            added[top : top + height, corner.columns.start % size :][:, :columns] = corner.delta
        step = max(1, _AT_ONCE // (width * size))
        for start in range(0, len(rows), step):
            here = slice(start, start + step)
            yield rows[here, None], firsts[here, None] + np.arange(width), added[here].reshape(-1, width, size)


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


def opened(linear: Linear, folder: Path, held: Held | None = None) -> Stored | Dequantized:
    """A node's quantized weight, to be read and written group by group.

    Args:
        linear: the node.
        folder: where its model.onnx lies.
        held: as `writable`'s.
    """
    return (Stored if linear.layout == "MatMulNBits" else Dequantized)(linear, folder, held)


class Stored:
    """A node's quantized weight, opened for reading and writing group by group."""

    def __init__(self, linear: Linear, folder: Path, held: Held | None = None) -> None:
        """Open the initializers of a MatMulNBits node, as `writable` does; `folder` is where its model.onnx lies."""
        assert linear.scales is not None
        self._values = linear.stored
        self._arrays = [writable(value, folder, held) for value in self._values]
        self._bits, self._size = linear.bits, linear.group_size
        self._inputs = linear.in_features
        self._groups = -(-linear.in_features // linear.group_size)
        self._codes = self._arrays[0].reshape(linear.out_features, self._groups, -1)
        self._scales = self._arrays[1].reshape(linear.out_features, self._groups)
        self._zeros = self._arrays[2].reshape(linear.out_features, -1) if len(self._arrays) > 2 else None
        self._between = self._zeros is not None and self._zeros.dtype != np.uint8  # zero points are floats

    def part(self, rows: Index, groups: Index) -> Grid:
        """A copy of some rows and groups; what pads the last one is worth 0, whatever its bytes say.

        Args:
            rows: a slice, or an array (rows, 1).
            groups: a slice, or an array (rows, groups), each row's own.
        """
        scales = self._scales[rows, groups].astype(np.float32)
        zeros: Array = np.full(scales.shape, 2 ** (self._bits - 1), np.uint8)
        if self._zeros is not None and self._between:
            zeros = self._zeros[rows, groups].astype(np.float32)
        elif self._zeros is not None:
            zeros = unpack(np.array(self._zeros[_line(rows)]), self._bits, self._groups)[_each(groups)]
        codes = unpack(np.array(self._codes[rows, groups]), self._bits, self._size)
        if self._inputs % self._size:
            worthless = np.clip(np.rint(zeros), 0, 2**self._bits - 1).astype(np.uint8)[..., None]
            codes = np.where(self._past_the_end(groups), worthless, codes)
        return Grid(codes, scales, zeros, self._bits, self._zeros is None)

    def put(self, rows: Index, groups: Index, grid: Grid) -> None:
        """Write some rows and groups, as `part` takes them; all others stay, and so does what pads the last one."""
        codes = grid.codes
        if self._inputs % self._size:
            before = unpack(np.array(self._codes[rows, groups]), self._bits, self._size)
            codes = np.where(self._past_the_end(groups), before, codes)
        self._codes[rows, groups] = pack(codes, self._bits)
        self._scales[rows, groups] = grid.scales.astype(self._scales.dtype)
        if self._zeros is not None and self._between:
            self._zeros[rows, groups] = grid.zeros.astype(self._zeros.dtype)
        elif self._zeros is not None:
            stored = self._zeros[_line(rows)]
            points = unpack(np.array(stored), self._bits, self._groups)
            points[_each(groups)] = grid.zeros
            packed = pack(points, self._bits)
            # the bytes' spare bits at a row's end stay as they were
            whole = self._groups * self._bits // 8
            packed[:, whole:] |= stored[:, whole:] & np.uint8(0xFF << (self._groups * self._bits % 8) & 0xFF)
            self._zeros[_line(rows)] = packed

    def _past_the_end(self, groups: Index) -> npt.NDArray[np.bool_]:
        """Which inputs of these groups, (…, groups, size), lie past the layer's last one."""
        numbers = np.arange(self._groups)[groups] if isinstance(groups, slice) else groups
        past: npt.NDArray[np.bool_] = numbers[..., None] * self._size + np.arange(self._size) >= self._inputs
        return past

    def close(self) -> None:
        """Have what was put reach the file, or the graph."""
        for value, array in zip(self._values, self._arrays, strict=True):
            keep(value, array)


def _line(rows: Index) -> Index:
    """The rows, to index one axis with."""
    return rows if isinstance(rows, slice) else rows[:, 0]


def _each(groups: Index) -> tuple[Index, Index]:
    """Each row's groups, to index (rows, groups) with."""
    return (slice(None) if isinstance(groups, slice) else np.arange(len(groups))[:, None]), groups


def read(one: Match, folder: Path) -> Grid:
    """The module's grid, (out, groups, size)."""
    every = slice(0, None)
    return Grid.joined([opened(at.linear, folder).part(slice(at.start, at.stop), every) for at in one.pieces])


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
