"""Initializers of an ONNX graph as numpy arrays that can be written to, and codes that a DequantizeLinear reads.

What is written changes the data file itself, where the values lie in one, and only the bytes of the initializer; or
copies that are held until the file is rewritten.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import fill
from diablo_export.converters.onnx_linears import Linear
from diablo_export.errors import InputError
from diablo_export.quantization import Codes, pack, unpack
from diablo_export.requantize import Grid

Index = slice | npt.NDArray[np.int64]  # rows, or (rows, 1); groups, or (rows, groups), each row's own
Bytes = npt.NDArray[np.uint8]


class Held:
    """Copies of initializers' bytes, by name, in memory that is used again: to be given new costs more than to copy."""

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}
        self._spare: list[Bytes] = []

    def get(self, name: str, file: Path, start: int, size: int) -> Bytes:
        """The copy; what the file has from `start` on where there is none yet."""
        if name not in self._held:
            fitting = (index for index, memory in enumerate(self._spare) if memory.size >= size)
            index = next(fitting, None)
            memory = np.empty(size, np.uint8) if index is None else self._spare.pop(index)
            with file.open("rb", buffering=0) as stream:
                stream.seek(start)
                read_on(stream, memory[:size], file)
            self._held[name] = memory[:size]
        return self._held[name]

    def give_up(self, name: str) -> Bytes:
        """The copy, for the last time: its memory is used again once another is asked for."""
        held = self._held.pop(name)
        self._spare.append(held if held.base is None else np.asarray(held.base))
        return held


def read_on(stream: IO[bytes], memory: Bytes, file: Path) -> None:
    """Read the next bytes of a file, as many as there is memory.

    Raises:
        InputError: it has fewer.
    """
    if not fill(stream, memory):
        raise InputError(f"{file}: became shorter while it was read; copy it again")


def writable(value: ir.Value, folder: Path, held: Held | None = None) -> Array:
    """The initializer's values; writing to them changes the data file, where that is where they are.

    Types narrower than a byte come as they are packed: a flat array of bytes. With `held` the data file stays as it is:
    what is written changes the copy of the initializer's bytes there, read from the file where there is none yet.
    """
    tensor = value.const_value
    assert tensor is not None
    narrow = tensor.dtype.bitwidth < 8
    if not isinstance(tensor, ir.ExternalTensor):
        return np.frombuffer(tensor.tobytes(), np.uint8).copy() if narrow else np.array(tensor.numpy())
    file, start = folder / tensor.location, tensor.offset or 0
    size = tensor.length if tensor.length is not None else tensor.nbytes
    if held is None:
        raw: Bytes = np.memmap(file, np.uint8, "r+", start, (size,))
    else:
        raw = held.get(str(value.name), file, start, size)
    return raw if narrow else raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def keep(value: ir.Value, array: Array) -> None:
    """Finish what `writable` began."""
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        return  # a mapping is the file; `output.new_folder` has all of it reach the disk at once
    if tensor.dtype.bitwidth < 8:
        value.const_value = ir.PackedTensor(array, tensor.dtype, shape=list(tensor.shape.numpy()), name=value.name)
    else:
        value.const_value = ir.tensor(array, name=value.name)


class Dequantized:
    """A weight that a DequantizeLinear makes of integers, opened for reading and writing group by group.

    Signed codes and zero points are moved by half their range, so that they are those of a `Grid`.
    """

    def __init__(self, linear: Linear, folder: Path, held: Held | None = None) -> None:
        """Open the initializers of the node, as `writable` does; `folder` is where its model.onnx lies."""
        self._values = [value for value in linear.stored if value not in (linear.bias or ())]
        self._arrays = [writable(value, folder, held) for value in self._values]
        self._bias = None if linear.bias is None else _Bias(linear.bias, self._arrays[1], folder, held)
        self._bits, self._size, self._inputs = linear.bits, linear.group_size, linear.in_features
        self._flip = linear.transposed
        dtype = linear.weight.dtype
        self._half = 2 ** (self._bits - 1) if dtype is not None and dtype.name.startswith("INT") else 0
        self._unpacked = [self._read(index) for index in (0, 2) if index < len(self._arrays)]
        self._lift, self._used = self._room()
        self._codes = self._oriented(self._unpacked[0])  # (out, in), a view
        self._scales = self._oriented(self._arrays[1])  # (out, groups), a view
        self._zeros = self._oriented(self._unpacked[1]) if len(self._unpacked) > 1 else None

    def part(self, rows: Index, groups: Index) -> Grid:
        """A copy of some rows and groups; what pads the last one is worth 0."""
        scales = self._scales[rows, groups].astype(np.float32)
        zeros = np.full(scales.shape, 2 ** (self._used - 1), np.uint8)
        if self._zeros is not None:
            zeros = self._zeros[rows, groups] - self._lift
        codes = np.repeat(zeros, self._size, 1)
        columns = self._columns(groups)
        if isinstance(columns, slice):
            stored = self._codes[rows, columns]
            codes[:, : stored.shape[1]] = stored - self._lift
        else:
            there = self._codes[rows, np.minimum(columns, self._inputs - 1)] - self._lift
            codes = np.where(columns < self._inputs, there, codes)
        return Grid(codes.reshape(*scales.shape, self._size), scales, zeros, self._used, self._zeros is None)

    def put(self, rows: Index, groups: Index, grid: Grid) -> None:
        """Change some rows and groups; all others stay."""
        columns, codes = self._columns(groups), grid.codes.reshape(len(grid.codes), -1) + self._lift
        if isinstance(columns, slice):
            width = len(range(*columns.indices(self._inputs)))
            self._codes[rows, columns] = codes[:, :width]
        else:
            inside = columns < self._inputs
            each = np.broadcast_to(np.asarray(rows), columns.shape)
            self._codes[each[inside], columns[inside]] = codes[inside]
        self._scales[rows, groups] = grid.scales.astype(self._scales.dtype)
        if self._zeros is not None:
            self._zeros[rows, groups] = grid.zeros + self._lift

    def close(self) -> None:
        """Have what was put reach the file, or the graph."""
        for index, codes in zip((0, 2), self._unpacked, strict=False):
            raw = self._arrays[index].reshape(-1).view(np.uint8)
            packed = pack(codes.reshape(-1) ^ np.uint8(self._half), self._bits)
            spare = codes.size * self._bits % 8
            if spare:  # the bits behind the last code stay as they were
                packed[-1] |= raw[-1] & np.uint8(0xFF << spare & 0xFF)
            raw[:] = packed
        if self._bias is not None:
            self._bias.follow(self._arrays[1])
        for value, array in zip(self._values, self._arrays, strict=True):
            keep(value, array)

    def _room(self) -> tuple[np.uint8, int]:
        """The lowest code in use, and bits: 7 of 8 where quantizers left one out (`reduce_range`).

        Processors without VNNI add products of two bytes in pairs, in 16 bits: with all 8 bits these sums are cut off.
        """
        lowest = np.uint8(self._half // 2)  # half the codes, around the middle of signed ones
        if self._bits == 8 and all(((each >= lowest) & (each <= lowest + 128)).all() for each in self._unpacked):
            return lowest, 7
        return np.uint8(0), self._bits

    def _read(self, index: int) -> Codes:
        """Codes or zero points from their bytes, in the stored shape."""
        shape = self._values[index].const_value.shape.numpy()  # type: ignore[union-attr]
        count = int(np.prod(shape))
        codes = unpack(self._arrays[index].reshape(-1).view(np.uint8), self._bits, count)
        return (codes ^ np.uint8(self._half)).reshape(shape)

    def _oriented(self, stored: Array) -> Array:
        """(out, …) of what is stored by inputs and outputs, or by outputs alone."""
        if stored.ndim == 1:
            return stored[:, None]
        return stored.T if self._flip else stored

    def _columns(self, groups: Index) -> Index:
        """The inputs of these groups."""
        if not isinstance(groups, slice):
            return (groups[..., None] * self._size + np.arange(self._size)).reshape(len(groups), -1)
        stop = None if groups.stop is None else groups.stop * self._size
        return slice(groups.start * self._size, stop)


class _Bias:
    """A bias of int32 codes on the grid of x's scale times the weight's, one scale for each output."""

    def __init__(self, values: tuple[ir.Value, ir.Value], scales: Array, folder: Path, held: Held | None) -> None:
        """Open its codes and scales; `scales` are the weight's, (out,), as they are before anything changes."""
        self._values, self._old = values, scales.copy()
        self._codes, self._steps = (writable(value, folder, held) for value in values)

    def follow(self, scales: Array) -> None:
        """Bring it to the grid of the weight's new scales; outputs whose scale is the same keep their bytes."""
        moved = (scales != self._old) & (scales != 0)
        ratio = scales[moved].astype(np.float64) / self._old[moved]
        codes = np.rint(self._codes[moved] / ratio)  # the old codes in the new steps
        largest = np.iinfo(np.int32).max
        self._codes[moved] = np.clip(codes, -largest, largest).astype(np.int32)
        self._steps[moved] = (self._steps[moved] * ratio).astype(self._steps.dtype)
        for value, array in zip(self._values, (self._codes, self._steps), strict=True):
            keep(value, array)
