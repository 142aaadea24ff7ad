"""How a part of `run.py` goes on where something fails, and how kinds of the same work are timed beside each other."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any


def attempt(name: str, do: Callable[[], None], found: dict[str, Any]) -> bool:
    """What fails is named in `found`, and what comes after it is done all the same."""
    try:
        do()
    except Exception as error:
        first = str(error).partition("\n")[0]
        failed = f"{name}: {type(error).__name__}: {first}"
        found["failed"] = f"{found['failed']}; {failed}" if "failed" in found else failed
        traceback.print_exc()
        return False
    return True


def in_turns(clocks: dict[str, Callable[[], float]], turns: int) -> Iterator[dict[str, list[float]]]:
    """Seconds of each so far, after each turn; another begins every time: a GPU that warms up is no kind's loss."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for turn in range(turns):
        for name in list(clocks)[turn % len(clocks) :] + list(clocks)[: turn % len(clocks)]:
            times[name].append(clocks[name]())
        yield times
