"""What a person sees: messages and progress on standard error, so that standard output holds only results."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("diablo_export")


def stderr() -> Console:
    """A rich console on standard error; rich is loaded on first use, --help does not need it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_what_fits() -> None:
    """Have a letter that standard output or error cannot hold, such as ≤ in ASCII, become "?" and not an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def set_verbosity(level: int) -> None:
    """Show this package's log messages of `level` and above on standard error."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        # a root logger with a handler is left alone by the basicConfig() that some libraries call: no second copy
        logging.getLogger().addHandler(logging.NullHandler())
    log.setLevel(level)


@contextlib.contextmanager
def progress(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar with time left on a terminal, nothing elsewhere or without rich; yields `advance(amount)`."""
    try:
        console = stderr()
    except ImportError:  # a device that has numpy alone
        console = None
    if console is None or not console.is_terminal or log.getEffectiveLevel() > logging.INFO:
        yield lambda amount: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
