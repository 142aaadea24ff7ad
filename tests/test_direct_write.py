"""Files written past the page cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from diablo_export.converters.direct_write import SIZE, direct_writer


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 8193])
def test_every_byte_arrives(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    file = tmp_path / "file"
    file.write_bytes(b"old and longer" * SIZE if size == 1 else b"old")  # longer than what replaces it, once
    with direct_writer(file) as out:
        for start in range(0, size, 777_777):
            out.write(memoryview(content)[start : start + 777_777])
    assert file.read_bytes() == content


@pytest.mark.parametrize("row", [1, 4097, 1_000_003, SIZE + 5])
def test_bytes_put_into_its_memory_arrive(tmp_path: Path, row: int) -> None:
    rows = [np.full(row, number, np.uint8) for number in range(11)]
    with direct_writer(tmp_path / "file", row) as out:
        out.write(memoryview(b"header"))
        for value in rows:
            room = out.room(row)
            assert room.size >= row
            room[:row] = value
            out.take(row)
    assert (tmp_path / "file").read_bytes() == b"header" + b"".join(value.tobytes() for value in rows)


def test_a_file_system_without_direct_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened, refused = os.open, []

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with direct_writer(tmp_path / "file") as out:
        out.write(memoryview(b"all of it"))
    assert refused and (tmp_path / "file").read_bytes() == b"all of it"


def test_a_full_disk_is_told() -> None:
    with pytest.raises(OSError, match="No space left"), direct_writer(Path("/dev/full")) as out:
        out.write(memoryview(bytes(SIZE + 1)))
