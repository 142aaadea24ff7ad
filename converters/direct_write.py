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
import numpy.typing as npt

SIZE = 8 << 20  # bytes of a buffer
_BLOCK = 4096  # of every file system or a multiple: a write's size and its places in the file and in memory keep to it


class DirectWriter:
    """Takes bytes in order; two buffers take turns, one being filled while the other is on its way."""

    def __init__(self, descriptor: int, thread: ThreadPoolExecutor, size: int) -> None:
        self.descriptor, self.thread = descriptor, thread
        self.buffers = [np.frombuffer(mmap.mmap(-1, size), np.uint8) for _ in range(2)]  # page-aligned
        self.used = 0
        self.pending: Future[None] | None = None

    def room(self, least: int) -> npt.NDArray[np.uint8]:
        """Memory for the next bytes, `least` of them or more; `take` says how many were put there.

        Raises:
            OSError: the disk is full, or fails; perhaps for bytes that were taken before.
        """
        if self.used + least > self.buffers[0].size:
            self._send()
        return self.buffers[0][self.used :]

    def take(self, count: int) -> None:
        """The first `count` bytes of `room` are the next ones of the file."""
        self.used += count

    def write(self, view: memoryview) -> None:
        """Take a copy of bytes from elsewhere; raises as `room` does."""
        while len(view):
            room = self.room(1)
            count = min(room.size, len(view))
            # numpy's copy lets other threads run, a memoryview's does not
            room[:count] = np.frombuffer(view[:count], np.uint8)
            self.take(count)
            view = view[count:]

    def finish(self) -> None:
        """Write what is left: whole blocks as before, the last part of one through the cache."""
        self._send()
        self.wait()
        tail = self.buffers[0][: self.used].tobytes()
        if tail:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, 0)
            _write_all(self.descriptor, memoryview(tail))
        os.fsync(self.descriptor)

    def wait(self) -> None:
        """Wait until everything sent is written."""
        if self.pending is not None:
            self.pending.result()

    def _send(self) -> None:
        """Send the whole blocks; the part of one behind them begins the other buffer."""
        self.wait()
        whole = self.used // _BLOCK * _BLOCK
        full = self.buffers[0]
        self.buffers.reverse()
        self.used -= whole
        self.buffers[0][: self.used] = full[whole : whole + self.used]
        if whole:
            self.pending = self.thread.submit(_write_all, self.descriptor, full[:whole].data)


@contextlib.contextmanager
def direct_writer(file: Path, widest: int = 0) -> Iterator[DirectWriter]:
    """Open `file` anew; what was written is on the disk when the body ends without an exception.

    Args:
        file: the file to write.
        widest: the most bytes that `room` will be asked for.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError:
        descriptor = os.open(file, flags, 0o666)
    with ThreadPoolExecutor(1) as thread:
        writer = DirectWriter(descriptor, thread, max(SIZE, widest + _BLOCK))
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
