"""Which modules of an int4 merge are worth more bytes: a greedy choice by estimate, verified on logits.

All modules begin merged at the base's bits, the least there is. Where that does not keep what was asked for, a module
can be merged at 8 bits, or keep its blocks as a branch. Each is worth the nats that it saves for the bytes and the time
that it costs. The best of them are taken, as few as hold: how many, the logits say, by bisection; then each is tried
without, the dearest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diablo_export.measure.survival import Survival

# What the nodes of a branch take beside reading its blocks, as bytes that a processor reads meanwhile: 168 branches
# lengthen a step of decoding by 1.2 ms, 7 µs each, at about 10 GB/s (examples/benchmarks/whole_model.py)
NODE_BYTES = 1 << 16
_WITHOUT = 8  # options that are tried without, at most: each is a pass over the text

Choices = dict[str, str]


@dataclass(frozen=True)
class Option:
    """Another way for one module than its merge at the base's bits.

    Attributes:
        module: its path.
        choice: int8 or branch.
        bytes: that the files grow by, at most.
        saved: nats of KL, estimated.
    """

    module: str
    choice: str
    bytes: int
    saved: float

    @property
    def cost(self) -> int:
        """Bytes, and the time of nodes as bytes."""
        return self.bytes + (NODE_BYTES if self.choice == "branch" else 0)

    @property
    def worth(self) -> float:
        """Nats for a byte."""
        return self.saved / max(1, self.cost)


@dataclass(frozen=True)
class Settled:
    """What was decided.

    Attributes:
        options: that were taken.
        survival: of that, measured.
        needs: bytes that the smallest plan found adds which holds; None where none was looked for or found.
    """

    options: tuple[Option, ...]
    survival: Survival
    needs: int | None = None


def best_first(options: Iterable[Option]) -> list[Option]:
    """One option for each module, that of most worth; those of most worth first."""
    best: dict[str, Option] = {}
    for option in options:
        if option.module not in best or option.worth > best[option.module].worth:
            best[option.module] = option
    return sorted(best.values(), key=lambda option: -option.worth)


def settle(
    options: Sequence[Option],
    measure: Callable[[Choices], Survival],
    least: float,
    room: float,
    advance: Callable[[float], None] = lambda amount: None,
) -> Settled:
    """The least options that keep `least`, within `room`; else those within it that keep most.

    Args:
        options: of all modules; several of one module are alternatives.
        measure: the survival when these modules are done so, all others merged.
        least: survival asked for.
        room: bytes that may be added; below 0 none are.
        advance: is called with 1 after each measurement.
    """
    known: dict[frozenset[tuple[str, str]], Settled] = {}

    def measured(taken: Sequence[Option]) -> Settled:
        key = frozenset((option.module, option.choice) for option in taken)
        if key not in known:
            known[key] = Settled(tuple(taken), measure({one.module: one.choice for one in taken}))
            advance(1)
        return known[key]

    nothing = measured(())
    if nothing.survival.holds(least):
        return nothing
    ordered, exact = best_first(options), best_first(one for one in options if one.choice == "branch")
    for offered in (ordered, exact):  # where 8 bits do not hold, branches do: they lose nothing
        found = _least(_within(offered, room), measured, least)
        if found is not None:
            return found
    needed = None if room == float("inf") else (_least(ordered, measured, least) or _least(exact, measured, least))
    fitting = [one for one in known.values() if sum(option.bytes for option in one.options) <= max(0, room)]
    nearest = min(fitting, key=lambda one: one.survival.distance)
    needs = None if needed is None else sum(option.bytes for option in needed.options)
    return Settled(nearest.options, nearest.survival, needs)


def _within(options: Sequence[Option], room: float) -> list[Option]:
    """Those of them that fit, taken in order."""
    taken, left = [], room
    for option in options:
        if option.bytes <= left:
            taken.append(option)
            left -= option.bytes
    return taken


def _least(options: Sequence[Option], measured: Callable[[Sequence[Option]], Settled], least: float) -> Settled | None:
    """As few of the first of these as hold, then without those that turn out not to be needed; None where none do."""
    if not options or not measured(options).survival.holds(least):
        return None
    fails, holds = 0, len(options)
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if measured(options[:middle]).survival.holds(least):
            holds = middle
        else:
            fails = middle
    best = measured(options[:holds])
    for option in sorted(best.options, key=lambda one: -one.cost)[:_WITHOUT]:
        fewer = measured([one for one in best.options if one != option])
        if fewer.survival.holds(least):
            best = fewer
    return best


def stored_bytes(
    out: int, groups: int, size: int, bits: int, symmetric: bool, scale: int, between: bool = False
) -> int:
    """Bytes of a quantized weight: codes, scales of `scale` bytes each, zero points (floats where `between`)."""
    zeros = 0 if symmetric else groups * scale if between else -(-groups * bits // 8)
    return out * (groups * (size * bits // 8 + scale) + zeros)


def counted(choices: Mapping[str, str]) -> dict[str, Any]:
    """How many modules have each choice, in a fixed order."""
    order = ("int2", "int4", "int8", "branch", "float")
    return {choice: count for choice in order if (count := sum(one == choice for one in choices.values()))}
