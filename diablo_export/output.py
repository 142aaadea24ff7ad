"""Output folders and files that are either the old one or the new one, never half of either.

The new one is filled beside its destination, flushed to the disk and renamed. Replacing an existing folder swaps
the two names in one system call where Linux offers that.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diablo_export.errors import OutputError

# what this program says of a folder
MANIFEST, PARITY = "diablo_export.json", "parity.json"
CERTIFICATE, GOLDEN = "certificate.json", "certificate.npz"
REPORTS = (PARITY, CERTIFICATE, GOLDEN)  # these of how its weights were judged: beside others they would be wrong
_RANDOM = 8  # characters that mkdtemp adds to a name
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False, needs: int = 0) -> Iterator[Path]:
    """A folder to fill; it becomes `path` when the block ends, and is removed when the block raises.

    Args:
        path: the destination.
        overwrite: replace an existing `path`; without it an existing one is an error.
        needs: bytes that will be written, checked against the free space before anything is.

    Raises:
        OutputError: `path` exists, cannot be written, or there is not room enough (also while writing).
    """
    check_output(path, overwrite, needs)
    target = real(path)
    _remove_abandoned(target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{os.getpid()}-", dir=target.parent))
    clear = functools.partial(shutil.rmtree, work, ignore_errors=True)
    atexit.register(clear)  # a Ctrl-C can arrive in the very clean-up below, or just before it
    try:
        work.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        with full_disk_said(target):
            yield work
            _flush(work)
            check_output(path, overwrite)  # another run may have come first
            _move_into_place(work, target)
    finally:
        clear()
        atexit.unregister(clear)


@contextlib.contextmanager
def new_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A file to write; it becomes `path` when the block ends, and is removed when the block raises.

    Raises:
        OutputError: `path` exists and `overwrite` is false, is a folder, cannot be written, or the disk is full.
    """
    target = real(path)
    if target.is_dir():
        raise OutputError(f"{path}: is a folder; choose a file for --output")
    if target.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another --output, or give --overwrite to replace it")
    _check_parent(target)
    _remove_abandoned(target)
    work = target.with_name(f".{target.name}.partial-{os.getpid()}-file")
    clear = functools.partial(work.unlink, missing_ok=True)
    atexit.register(clear)
    try:
        with full_disk_said(target):
            work.touch()
            yield work
            _flush(work)
            work.replace(target)
    finally:
        clear()
        atexit.unregister(clear)


def real(path: str | Path) -> Path:
    """Where an output goes, past links: what a link leads to is written, and the link stays.

    Raises:
        OutputError: a name that the file system does not take, or links that lead in a circle.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OutputError(f"{path}: links that lead in a circle; choose another --output")
    try:
        os.lstat(target.parent / f".{target.name}.partial-{os.getpid()}-{'x' * _RANDOM}")  # the longest to be
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; choose another --output") from error
    return target


@contextlib.contextmanager
def full_disk_said(target: Path, left: str = "nothing was left behind") -> Iterator[None]:
    """A disk that runs full while `target` is written, or that takes no file so large, is an OutputError.

    Args:
        target: what the message names.
        left: what it says of what was written so far.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{target}: a file grew past what this disk or the limit of this process (ulimit -f) allows; "
                f"{left}. Raise the limit or choose another --output"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{target}: the disk is full ({_megabytes(shutil.disk_usage(target.parent).free)} free); "
                f"{left}. Free some room or choose another --output"
            ) from error
        raise


def check_output(path: str | Path, overwrite: bool = False, needs: int = 0) -> None:
    """Refuse an output folder that cannot be written, before any long work starts.

    Raises:
        OutputError: it exists and `overwrite` is false, is no folder, its parent is not writable, or the disk
            has fewer than `needs` bytes free.
    """
    target = real(path)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{path}: exists and is a file; choose a folder for --output")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another --output, or give --overwrite to replace it")
    _check_parent(target)
    free = shutil.disk_usage(target.parent).free
    if needs > free:
        raise OutputError(
            f"{path}: about {_megabytes(needs)} will be written, {_megabytes(free)} are free; free some room or choose "
            "another --output"
        )


def keep_inputs(path: str | Path, *inputs: str | Path | None) -> None:
    """Refuse an output folder that is, or holds, something that is read: replacing it would destroy that.

    Args:
        path: the output folder.
        inputs: files and folders; names that are none, such as Hugging Face ids, and None are passed over.

    Raises:
        OutputError: names the input.
    """
    target = real(path)
    for given in inputs:
        place = None if given is None else Path(os.path.realpath(given))
        if place is not None and place.exists() and target in (place, *place.parents) and target.is_dir():
            what = "is read" if place == target else f"holds {given}, which is read,"
            raise OutputError(f"{path}: {what} and would be replaced; choose another --output")


def _check_parent(target: Path) -> None:
    """Make the folder that `target` goes to, and see that it can be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target.parent}: cannot be made: {error.strerror}; choose another --output") from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target.parent}: not writable; choose another --output, or change its permissions")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.3g} MB"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_abandoned(target: Path) -> None:
    """Remove what killed runs left beside `target`; a run that is still alive keeps its own."""
    for left in target.parent.glob(f".{target.name}.partial-*"):
        pid = left.name.split("partial-", 1)[1].partition("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(written: Path) -> None:
    if os.name != "posix":
        return
    for path in [*written.rglob("*"), written]:
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_into_place(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
    elif not any(target.iterdir()):
        target.rmdir()
        work.rename(target)
    elif not _exchange(work, target):  # now `work` is the old folder; the caller removes it
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{os.getpid()}-", dir=target.parent))
        try:
            target.rename(old / "old")
        except OSError as error:  # a mount point, or a folder that another program holds
            old.rmdir()
            raise OutputError(f"{target}: cannot be replaced: {error.strerror}; choose another --output") from error
        work.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)
