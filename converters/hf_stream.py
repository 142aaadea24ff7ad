"""Tensors from one safetensors file to another through a few small buffers, blocks added on the way.

A thread reads, checks, merges and hashes, another writes. Bytes are read to where they are written from, a piece at a
time that stays in the processor's cache until all of that is done: fresh memory for every tensor costs more time than
the merge itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from diablo_export.adapter import AdaptedModule
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import DTYPE_NAMES, DTYPES, TensorInfo, fill
from diablo_export.converters.direct_write import DirectWriter, direct_writer
from diablo_export.converters.rounding import Kept
from diablo_export.errors import AdapterError, CheckpointError
from diablo_export.manifest import file_xxh3

CHUNK = 2 << 20  # bytes of a piece: a second-level cache; smaller ones make the threads meet too often

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Part:
    """One tensor to write: copied from `source`, merged where there is a `module`, given as `value` or by `make`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None = None
    module: AdaptedModule | None = None
    value: Array | None = None
    transposed: bool = False  # stored (in, out), as GPT-2 does
    make: Callable[[], Array] | None = None  # makes the value when its turn comes


def write_parts(
    file: Path,
    header: bytes,
    parts: Sequence[Part],
    merged: Callable[[Part, float], None],
    refuse: Callable[[Part], None],
    advance: Callable[[float], None],
    source: Path,
) -> tuple[str, str]:
    """Write `header` and `parts` to `file`; return its SHA-256 and the XXH3-128 of `source`.

    Args:
        file: the file to write.
        header: its first bytes.
        parts: its tensors, in order.
        merged: called after each merged part with how much of its blocks is left after rounding.
        refuse: called for a part whose base weight is not the one of its fingerprint; must raise.
        advance: called with the bytes that are done.
        source: the file of the base that this one is made from; it is hashed as it is read.
    """
    digest, base = hashlib.sha256(header), _InPassing(source, [part.source for part in parts if part.source])
    with direct_writer(file, max(map(_row, parts), default=0)) as out:
        out.write(memoryview(header))
        for piece in _pieces(parts, out, base, merged, refuse):
            digest.update(piece.data)
            advance(piece.size)
    return digest.hexdigest(), base.hexdigest()


def _row(part: Part) -> int:
    """Bytes that are worked on together: a row where blocks are to be added."""
    return part.shape[-1] * DTYPES[part.dtype].itemsize if part.module is not None else 1


def _pieces(
    parts: Sequence[Part],
    out: DirectWriter,
    base: _InPassing,
    merged: Callable[[Part, float], None],
    refuse: Callable[[Part], None],
) -> Iterator[Bytes]:
    """Put `parts` into `out`; the pieces put there, each gone when the next is asked for."""
    for part in parts:
        value = part.make() if part.make is not None else part.value
        if value is not None:
            yield from _given(value, out)
            continue
        adding = None if part.module is None else _Adding(part, part.module)
        for piece in _read(part, out, base):
            if adding is not None:
                adding.add(piece)
            out.take(piece.size)
            yield piece
        if adding is not None:
            if not adding.matches():
                refuse(part)
            merged(part, adding.gain())


def _given(value: Array, out: DirectWriter) -> Iterator[Bytes]:
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK):
        piece = flat[start : start + CHUNK]
        out.write(piece.data)
        yield piece


def _read(part: Part, out: DirectWriter, base: _InPassing) -> Iterator[Bytes]:
    """The stored bytes, read into `out`'s memory but not yet taken, whole rows at a time."""
    source, row = part.source, _row(part)
    assert source is not None
    done = 0
    with source.file.open("rb", buffering=0) as stream:
        stream.seek(source.start)
        while done < source.nbytes:
            room = out.room(row)
            most = min(room.size, max(CHUNK, row), source.nbytes - done)
            piece = room[: most // row * row]
            if not fill(stream, piece):
                raise CheckpointError(f"{source.file}: ends inside tensor {source.name!r}; copy the file again")
            base.see(source.file, source.start + done, piece)
            done += piece.size
            yield piece


class _InPassing:
    """The XXH3-128 of a base file, from the pieces of it that are read anyway.

    They pass in the file's order in all but odd merges, such as a new head in place of a stored one; then the file is
    read once more.
    """

    def __init__(self, file: Path, read: Sequence[TensorInfo]) -> None:
        self.file, self.digest = file, xxhash.xxh3_128()
        self.at = min((info.start for info in read if info.file == file), default=0)
        with file.open("rb") as stream:
            self.digest.update(stream.read(self.at))  # the header

    def see(self, file: Path, start: int, piece: Bytes) -> None:
        if start == self.at and file == self.file:
            self.digest.update(piece.data)
            self.at += piece.size

    def hexdigest(self) -> str:
        return self.digest.hexdigest() if self.at == self.file.stat().st_size else file_xxh3(self.file)


class _Adding:
    """Blocks being added to one weight as its rows pass by, and the check that it is the right weight.

    The rows are those of the stored weight: outputs, or inputs where it is stored transposed.
    """

    def __init__(self, part: Part, module: AdaptedModule) -> None:
        self.part, self.module = part, module
        # (block, row of the block, column of the block), as stored
        self.blocks = module.blocks if part.transposed else module.blocks.transpose(0, 2, 1)
        self.row = 0
        self.kept = Kept()
        self.digest: Any = None
        self.known: bool | None = None
        mark = module.fingerprint
        if mark is not None and mark.dtype == part.dtype and not part.transposed:
            self.digest = xxhash.xxh3_128()
        elif mark is not None:  # rows as they pass are not what was hashed: look at the whole weight beforehand
            assert part.source is not None
            weight = part.source.read()
            self.known = mark.matches(weight.T if part.transposed else weight)

    def matches(self) -> bool:
        """Whether the rows that passed were the weight of the fingerprint; True where there is none."""
        if self.digest is None:
            return self.known is not False
        mark = self.module.fingerprint
        return mark is not None and self.digest.hexdigest() == mark.xxh3_128

    def add(self, piece: Bytes) -> None:
        """Add to the rows in `piece`, in place: float32 sums (float64 where either side is), rounded once."""
        if self.digest is not None:
            self.digest.update(piece.data)
        rows: Array = piece.view(DTYPES[self.part.dtype]).reshape(-1, self.part.shape[-1])
        wide = np.float64 if np.float64 in (rows.dtype, self.blocks.dtype) else np.float32
        _, height, width = self.blocks.shape
        stop = self.row + len(rows)
        for block in range(self.row // height, min(-(-stop // height), len(self.blocks))):
            first, last = max(block * height, self.row), min((block + 1) * height, stop)
            target = rows[first - self.row : last - self.row, block * width : (block + 1) * width]
            wanted: Array = self.blocks[
                block, first - block * height : last - block * height, : target.shape[1]
            ].astype(wide)
            before: Array = target.astype(wide)
            with np.errstate(over="ignore"):  # an overflow is an error of its own, see gain
                target[...] = (before + wanted).astype(rows.dtype)
            self.kept.add(before, target.astype(wide), wanted)
        self.row = stop

    def gain(self) -> float:
        """`Kept.gain`.

        Raises:
            AdapterError: base plus blocks is more than the dtype holds.
        """
        if not np.isfinite(self.kept.left):
            name, dtype = self.module.name, self.part.dtype
            raise AdapterError(f"{name}: base plus blocks overflows {dtype}; merge into a float32 copy of the base")
        return self.kept.gain


def given(name: str, value: Array) -> Part:
    """A part that does not come from the base, such as a classification head."""
    return Part(name, DTYPE_NAMES[value.dtype], value.shape, value=value)
