"""Time several runs of the same work side by side, so that what else the machine does hits all of them alike.

All take turns within a round, and the one that begins is another in each round. What counts is the ratio of two turns
of the same round; the median of the rounds' ratios has an interval from resampling the rounds.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
_TURN = 0.1  # seconds that a turn should take at least: short runs are repeated within it
_FEWEST_ROUNDS = 3  # however long they take
_RESAMPLES = 2000


@dataclass(frozen=True)
class Times:
    """Seconds of one run, (rounds,) each.

    Attributes:
        wall: by the clock.
        processor: of the calling thread; it sleeps while others have the processor, so only that is counted. Says
            something only where no other thread works for this one.
    """

    wall: Float64
    processor: Float64


def order(names: Sequence[str], turn: int) -> list[str]:
    """Who goes when in a round: in turn, each round begins with the next one."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    rounds: int,
    seconds: float,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, Times]:
    """Time `runs` by name in turns.

    Args:
        runs: what to time; each has run before.
        repeats: how many runs a turn is.
        rounds: how often each gets its turn.
        seconds: stop after this time, but not before the third round.
        advance: told 1 at the end of each round.

    Returns:
        Times by name.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    with _no_collector():
        for turn in range(rounds):
            if turn >= _FEWEST_ROUNDS and time.perf_counter() > end:
                advance(rounds - turn)
                break
            for name in order(list(runs), turn):
                taken[name].append(once(runs[name], repeats))
            advance(1)
    return {name: Times(*np.array(each).T) for name, each in taken.items()}


def summary(values: Float64) -> dict[str, float]:
    """Median, quartiles and least of some seconds."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "q1": float(low), "q3": float(high), "min": float(values.min())}


def ratio(values: Float64, base: Float64) -> dict[str, float]:
    """Median of the rounds' ratios to the base, its 95 % interval, and the ratio of the fastest turns."""
    ratios = values / base
    low, high = interval(ratios)
    fastest = float(values.min() / base.min())
    return {"median": float(np.median(ratios)), "low": low, "high": high, "of_fastest": fastest}


def interval(values: Float64, seed: int = 0) -> tuple[float, float]:
    """Where the median of such values lies in 19 of 20 cases, by drawing the values anew with replacement."""
    random = np.random.default_rng(seed)
    drawn = random.choice(values, (_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def turn_length(once_took: Iterable[float]) -> int:
    """How many runs make a turn that is long enough for the clock, from the seconds that one run of each took."""
    return max(1, round(_TURN / max(once_took)))


def once(run: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """Mean seconds of a run: by the clock, and of this thread's processor time, which is read within the clock's."""
    start, begun = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        run()
    processor = time.thread_time() - begun
    return (time.perf_counter() - start) / repeats, processor / repeats


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector looks through all objects now and then, in whoever's turn it is: not here."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
