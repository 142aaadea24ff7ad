"""Which modules get more bytes: on figures made up so that the best answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from diablo_export.converters.planner import NODE_BYTES, Choices, Option, best_first, counted, settle, stored_bytes
from diablo_export.measure.survival import Survival
from diablo_export.quantization import quantize

# nats that each module's merge costs, and what 8 bits or a branch add in bytes
LOSSES = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.05, "e": 0.0}
OPTIONS = [Option(name, "int8", 100_000, lost * 0.99) for name, lost in LOSSES.items()]
OPTIONS += [Option(name, "branch", 10_000, lost) for name, lost in LOSSES.items()]


def measured(left_of_int8: float = 0.01) -> tuple[Callable[[Choices], Survival], list[Choices]]:
    """A model whose modules' losses add up, as the cosine."""
    asked: list[Choices] = []

    def measure(choices: Choices) -> Survival:
        asked.append(dict(choices))
        shares = {"int8": left_of_int8, "branch": 0.0}
        lost = sum(loss * shares.get(choices.get(name, ""), 1.0) for name, loss in LOSSES.items())
        return Survival(1.0, 1 - lost, lost, 1.0, 1.0)

    return measure, asked


def test_nothing_where_merging_holds() -> None:
    measure, asked = measured()
    assert settle(OPTIONS, measure, 0.04, math.inf).options == () and asked == [{}]


def test_as_few_as_hold() -> None:
    measure, asked = measured()
    found = settle(OPTIONS, measure, 0.8, math.inf)
    assert {(option.module, option.choice) for option in found.options} == {("a", "branch"), ("b", "branch")}
    assert found.survival.cosine == pytest.approx(0.85) and found.needs is None
    assert len(asked) == len({tuple(sorted(one.items())) for one in asked}) <= 8  # nothing is measured twice


def test_what_bisection_takes_too_much_of_is_given_back() -> None:
    measure, _ = measured()
    options = [Option("d", "branch", 10_000, 9.0), *(one for one in OPTIONS if one.module != "d")]  # a wrong estimate
    found = settle(options, measure, 0.85, math.inf)
    assert {option.module for option in found.options} == {"a", "b"}


def test_the_cheaper_way_depends_on_the_size() -> None:
    small = [Option("a", "int8", 20_000, 0.5), Option("a", "branch", 10_000, 0.5)]
    assert small[1].cost == 10_000 + NODE_BYTES and best_first(small)[0].choice == "int8"  # nodes take time
    assert best_first(one for one in OPTIONS if one.module == "a")[0].choice == "branch"


def test_branches_where_8_bits_do_not_hold() -> None:
    measure, _ = measured(left_of_int8=0.5)
    options = [Option(one.module, one.choice, 1000 if one.choice == "int8" else 10_000, one.saved) for one in OPTIONS]
    assert best_first(options)[0].choice == "int8"
    found = settle(options, measure, 0.99, math.inf)
    assert {option.choice for option in found.options} == {"branch"} and found.survival.cosine > 0.99


def test_a_budget_that_is_too_small() -> None:
    measure, _ = measured()
    found = settle(OPTIONS, measure, 0.9, 15_000)
    assert [option.module for option in found.options] == ["a"]  # what one branch can keep
    assert not found.survival.holds(0.9) and found.survival.cosine == pytest.approx(0.55)
    assert found.needs == 30_000  # a, b and c


def test_no_room_at_all() -> None:
    """A bound between the merged model and that with a branch's function in it."""
    measure, _ = measured()
    found = settle(OPTIONS, measure, 0.9, -1)
    assert found.options == () and found.survival.cosine == pytest.approx(0.05) and found.needs == 30_000


def test_bytes_are_those_that_are_stored() -> None:
    weight = np.random.default_rng(0).normal(size=(24, 80)).astype(np.float32)
    for bits, symmetric in ((2, False), (4, True), (4, False), (8, False)):
        stored = quantize(weight, bits, 32, symmetric)
        zeros = 0 if stored.zero_points is None else stored.zero_points.nbytes
        wanted = stored.codes.nbytes + stored.scales.nbytes + zeros
        assert stored_bytes(24, 3, 32, bits, symmetric, 4) == wanted
    assert stored_bytes(24, 3, 32, 4, False, 4, between=True) == 24 * 3 * (16 + 4 + 4)


def test_counts() -> None:
    assert list(counted({"a": "branch", "b": "int4", "c": "int4"}).items()) == [("int4", 2), ("branch", 1)]
