from __future__ import annotations

import gc
import time
from collections import Counter

import numpy as np
import pytest

from diablo_export.timing.rounds import interleave, interval, once, order, ratio, summary, turn_length


def test_each_begins_in_turn() -> None:
    rounds = [order(["a", "b", "c"], turn) for turn in range(4)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_turns_are_interleaved() -> None:
    calls: list[str] = []
    told: list[float] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 2, 3, 60, told.append)  # type: ignore[misc]
    assert "".join(calls) == "aabb" + "bbaa" + "aabb"
    assert {name: each.wall.shape for name, each in times.items()} == {"a": (3,), "b": (3,)}
    assert told == [1, 1, 1]


def test_time_is_up_after_three_rounds_at_the_earliest() -> None:
    calls: Counter[str] = Counter()
    told: list[float] = []
    times = interleave({"a": lambda: calls.update("a")}, 1, 10, 0, told.append)
    assert calls["a"] == len(times["a"].wall) == 3
    assert sum(told) == 10  # the bar is full


def test_seconds_are_those_of_one_run() -> None:
    times = interleave({"sleep": lambda: time.sleep(0.01)}, 4, 3, 60)["sleep"]
    assert times.wall.min() >= 0.0099  # the clock may round
    assert times.wall.min() < 0.03  # four of them take longer
    assert times.processor.max() < 0.005  # asleep


def test_processor_time_is_read_within_the_clock() -> None:
    """However short the work and whatever comes between: a thread never works for longer than the clock runs."""
    times = [once(lambda: None) for _ in range(10_000)]
    assert all(processor <= wall for wall, processor in times)


def test_the_collector_waits_for_the_end() -> None:
    seen: list[bool] = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, 1, 3, 60)
    assert seen == [False] * 3 and gc.isenabled()


def test_short_runs_share_a_turn() -> None:
    assert turn_length([0.001, 0.01]) == 10
    assert turn_length([3.0]) == 1


def test_ratios_are_those_of_a_round() -> None:
    base = np.array([1.0, 2.0, 4.0])  # the machine gets slower and slower
    found = ratio(1.5 * base, base)
    assert found == {"median": 1.5, "low": 1.5, "high": 1.5, "of_fastest": 1.5}
    assert summary(base) == {"median": 2.0, "q1": 1.5, "q3": 3.0, "min": 1.0}


@pytest.mark.parametrize("rounds", [5, 25])
def test_the_interval_holds_the_median_in_nineteen_of_twenty(rounds: int) -> None:
    random = np.random.default_rng(0)
    held = []
    for _ in range(200):
        low, high = interval(random.exponential(1, rounds))
        held.append(low <= np.log(2) <= high)
    # of 200 a share of 0.95 varies by 0.015; five rounds cannot give a better interval than their least and largest,
    # which hold the median in 94 of 100
    assert np.mean(held) > 0.88
