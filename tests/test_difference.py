"""Runs of XOR: each of two files from the other, whatever their sizes."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest

from diablo_export.difference import PIECE, Content, content, write_difference, write_other


def difference(old: bytes, new: bytes) -> bytes:
    made = io.BytesIO()
    before, after, changed = write_difference(io.BytesIO(old), io.BytesIO(new), made, lambda _: None)
    assert before == Content(len(old), hashlib.sha256(old).hexdigest())
    assert after == Content(len(new), hashlib.sha256(new).hexdigest())
    size = max(len(old), len(new))
    assert changed == sum(a != b for a, b in zip(old.ljust(size, b"\0"), new.ljust(size, b"\0"), strict=True))
    return made.getvalue()


def other(source: bytes, made: bytes, size: int) -> bytes:
    target = io.BytesIO()
    digest = write_other(io.BytesIO(source), io.BytesIO(made), target, (len(source), size), lambda _: None)
    assert digest == hashlib.sha256(target.getvalue()).hexdigest()
    return target.getvalue()


def random(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def scattered(old: bytes, where: list[int]) -> bytes:
    new = bytearray(old)
    for at in where:
        new[at] ^= 0x5A
    return bytes(new)


BASE = random(PIECE + 1000)
CASES = {
    "nothing": (b"", b""),
    "equal": (BASE, BASE),
    "one byte": (b"a", b"b"),
    "first and last": (BASE, scattered(BASE, [0, len(BASE) - 1])),
    "both sides of a piece's end": (BASE, scattered(BASE, [PIECE - 1, PIECE, PIECE + 1])),
    "gaps of every length": (BASE, scattered(BASE, [50 * i + j for i in range(20) for j in (0, i)])),
    "all": (BASE, random(len(BASE), 1)),
    "longer": (BASE[:100], BASE),
    "shorter by pieces": (BASE + BASE, BASE[:5]),
    "made": (b"", BASE),
    "removed": (BASE, b""),
    "zeros at the end": (b"a", b"a" + bytes(10)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_file_from_the_other(case: str) -> None:
    old, new = CASES[case]
    made = difference(old, new)
    assert other(old, made, len(new)) == new
    assert other(new, made, len(old)) == old


def test_what_is_stored() -> None:
    old = bytes(100)
    new = scattered(old, [10, 12, 21, 40])  # 8 equal bytes between 12 and 21 are within a run, 18 are not
    made = np.frombuffer(difference(old, new)[:24], "<u4")
    assert made.tolist() == [2, 13, 10, 12, 18, 1]  # 2 runs of 13 bytes; 10 equal ones, then 12; 18, then 1
    assert difference(old, new)[24:] == new[10:22] + new[40:41]
    assert difference(BASE, BASE) == bytes(16)  # eight zeros for each of two pieces


def test_a_difference_may_be_broken_anywhere() -> None:
    old, new = BASE, scattered(BASE, list(range(0, 3000, 30)))
    made = difference(old, new)
    for size in (0, 5, 8, 500, len(made) - 1):
        with pytest.raises(ValueError, match="bytes too early"):
            other(old, made[:size], len(new))
    with pytest.raises(ValueError, match=f"4294967295 runs of 4294967295 bytes in a piece of {PIECE}"):
        other(old, b"\xff" * 100, len(new))
    for runs in ([1, 1, PIECE, 1], [1, 2, 0, 1], [2, 1, 2**31, 1, 2**31, 0]):  # past the end, wrong count, overflow
        with pytest.raises(ValueError, match="runs past the end of a piece"):
            other(old, np.array(runs, "<u4").tobytes() + bytes(PIECE), len(new))


def test_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BASE)
    told: list[float] = []
    assert content(tmp_path / "file", told.append) == Content(len(BASE), hashlib.sha256(BASE).hexdigest())
    assert sum(told) == len(BASE)
