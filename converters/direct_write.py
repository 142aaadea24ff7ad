"""A file written past the page cache, by a thread: the processor neither copies the bytes nor waits for the disk.

Where the file system has no such writes (O_DIRECT), they are plain ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIZE = 4 << 20  # bytes of a write: a multiple of every file system's block, as its place in the file and in memory is
_BLOCK = 4096


class DirectWriter:
    """Takes bytes in order; two buffers take turns, one being filled while the other is on its way."""

    def __init__(self, descriptor: int, thread: ThreadPoolExecutor) -> None:
        self.descriptor, self.thread = descriptor, thread
        self.buffers = [np.frombuffer(mmap.mmap(-1, SIZE), np.uint8) for _ in range(2)]  # page-aligned
        self.used = 0
        self.pending: Future[None] | None = None

    def write(self, view: memoryview) -> None:
        """Take bytes.

        Raises:
            OSError: the disk is full, or fails; perhaps for bytes that were taken before.
        """
        while len(view):
            count = min(SIZE - self.used, len(view))
            # numpy's copy lets other threads run, a memoryview's does not
            self.buffers[0][self.used : self.used + count] = np.frombuffer(view[:count], np.uint8)
            self.used, view = self.used + count, view[count:]
            if self.used == SIZE:
                self._send(SIZE)

    def finish(self) -> None:
        """Write what is left: whole blocks as before, the last part of one through the cache."""
        whole = self.used // _BLOCK * _BLOCK
        tail = self.buffers[0][whole : self.used].tobytes()
        self._send(whole)
        self.wait()
        if tail:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, 0)
            _write_all(self.descriptor, memoryview(tail))
        os.fsync(self.descriptor)

    def wait(self) -> None:
        """Wait until everything sent is written."""
        if self.pending is not None:
            self.pending.result()

    def _send(self, count: int) -> None:
        self.wait()
        if count:
            self.pending = self.thread.submit(_write_all, self.descriptor, self.buffers[0][:count].data)
        self.buffers.reverse()
        self.used = 0


@contextlib.contextmanager
def direct_writer(file: Path) -> Iterator[DirectWriter]:
    """Open `file` anew; what was written is on the disk when the body ends without an exception."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError:
        descriptor = os.open(file, flags, 0o666)
    with ThreadPoolExecutor(1) as thread:
        writer = DirectWriter(descriptor, thread)
        try:
            yield writer
            writer.finish()
        finally:
            with contextlib.suppress(OSError):
                writer.wait()  # its buffer must stay until then
            os.close(descriptor)


def _write_all(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]
