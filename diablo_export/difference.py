"""Where two files of one layout differ, as runs of XOR; with these each of the two is made from the other.

Both files are seen as pieces of PIECE bytes, the shorter one filled up with zeros. The difference is a stream of one
record a piece: the counts of runs and of bytes in them; per run the equal bytes before it and its length; the XOR of
the runs' bytes. All integers are little-endian uint32. An equal piece is eight zeros. Numpy alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

PIECE = 1 << 18  # Linux takes writes of this size six times as fast as those of 2²⁰ bytes
_GAP = 8  # equal bytes between two runs, up to which they are one: a run costs eight bytes, a little less when packed
_HEAD = struct.Struct("<II")

Bytes = npt.NDArray[np.uint8]
Advance = Callable[[float], object]  # is told how many bytes are done


@dataclass(frozen=True)
class Content:
    """What tells a file from others."""

    bytes: int
    sha256: str


def content(file: Path, advance: Advance) -> Content:
    """The content of a file."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            size += len(piece)
            advance(len(piece))
    return Content(size, digest.hexdigest())


def write_difference(old: IO[bytes], new: IO[bytes], to: IO[bytes], advance: Advance) -> tuple[Content, Content, int]:
    """Write the difference of two files; returns what they are, and how many bytes differ."""
    digests = hashlib.sha256(), hashlib.sha256()
    sizes = [0, 0]
    changed = 0
    while any(pieces := (old.read(PIECE), new.read(PIECE))):
        for side, piece in enumerate(pieces):
            digests[side].update(piece)
            sizes[side] += len(piece)
        change = _padded(pieces[0]) ^ _padded(pieces[1])
        runs = _runs(change)
        inside = change[_covered(runs)]
        to.write(_HEAD.pack(len(runs), len(inside)) + runs.tobytes() + inside.tobytes())
        changed += int(np.count_nonzero(inside))
        advance(len(pieces[1]))
    before, after = (Content(size, digest.hexdigest()) for size, digest in zip(sizes, digests, strict=True))
    return before, after, changed


def write_other(
    source: IO[bytes], difference: IO[bytes], target: IO[bytes], sizes: tuple[int, int], advance: Advance
) -> str:
    """Write the one file, given the other and what `write_difference` wrote.

    Args:
        source: the file that is there.
        difference: of the two files.
        target: where the other one goes.
        sizes: bytes of source and target.
        advance: is told how many bytes were written.

    Returns:
        The SHA-256 of what was written.

    Raises:
        ValueError: what is read is no difference of files of these sizes.
    """
    digest = hashlib.sha256()
    for at in range(0, max(sizes), PIECE):
        piece = _padded(source.read(PIECE))
        count, inside = _HEAD.unpack(_exactly(difference, _HEAD.size))
        if count > PIECE or inside > PIECE:
            raise ValueError(f"{count} runs of {inside} bytes in a piece of {PIECE}")
        if count:
            runs = np.frombuffer(_exactly(difference, 8 * count), "<u4").reshape(count, 2)
            if runs.sum(dtype=np.int64) > PIECE or runs[:, 1].sum(dtype=np.int64) != inside:
                raise ValueError("runs past the end of a piece")
            piece[_covered(runs)] ^= np.frombuffer(_exactly(difference, inside), np.uint8)
        written = piece[: max(0, min(PIECE, sizes[1] - at))].data
        digest.update(written)
        target.write(written)
        advance(len(written))
    return digest.hexdigest()


def _padded(piece: bytes) -> Bytes:
    padded = np.zeros(PIECE, np.uint8)
    padded[: len(piece)] = np.frombuffer(piece, np.uint8)
    return padded


def _runs(change: Bytes) -> npt.NDArray[np.uint32]:
    """(runs, 2): equal bytes before each run, and its length."""
    where = np.flatnonzero(change)
    if not len(where):
        return np.empty((0, 2), "<u4")
    cuts = np.flatnonzero(np.diff(where) > _GAP + 1) + 1
    starts = where[np.r_[0, cuts]]
    stops = where[np.r_[cuts - 1, len(where) - 1]] + 1
    return np.stack([starts - np.r_[0, stops[:-1]], stops - starts], 1).astype("<u4")


def _covered(runs: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Which bytes of a piece lie in runs, (PIECE,)."""
    mask = np.repeat(np.tile([False, True], len(runs)), runs.ravel())
    return np.concatenate([mask, np.zeros(PIECE - len(mask), np.bool_)])


def _exactly(stream: IO[bytes], count: int) -> bytes:
    read = stream.read(count)
    if len(read) != count:
        raise ValueError(f"ends {count - len(read)} bytes too early")
    return read
