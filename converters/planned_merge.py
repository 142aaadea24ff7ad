"""Merging into an int4 model by a plan: each module at the base's bits, at 8 bits, or with its blocks as a branch.

Codes are chosen by `grid_methods`. A plan is decided (`auto`) or read from a file; either way the survival
of the whole is measured, and the plan with what was measured lies in the folder as plan.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from diablo_export.adapter import Adapter
from diablo_export.base_grid import described
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log, progress
from diablo_export.converters import onnx_file
from diablo_export.converters.grid_methods import METHODS, Bench, Tried, best_of
from diablo_export.converters.grid_network import grid_network
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_keep import keep_branches
from diablo_export.converters.onnx_match import match
from diablo_export.converters.onnx_merge import put_head, refuse
from diablo_export.converters.plan_file import (
    BRANCH,
    PLAN,
    Plan,
    adapter_mark,
    base_mark,
    check_plan,
    read_plan,
    write_plan,
)
from diablo_export.converters.planner import Choices, Settled, counted, settle
from diablo_export.converters.ways import FLOAT, WIDE, WIDE_BITS, Ways
from diablo_export.errors import InputError
from diablo_export.requantize import Grid
from diablo_export.runtime import session

AUTO = "auto"
_MEASURED = 20  # plans that are looked at, about
_FUNCTION = 8192  # bytes of model.onnx that the operator's function takes

Rebuild = Callable[[Adapter, Collection[str]], Mapping[str, Mapping[str, Any]]]


def planned_merge(
    folder: Path,
    adapter: Adapter,
    *,
    plan: str | Path,
    reference: str | Path,
    rebuild: Rebuild | None = None,
    max_bytes: int | None = None,
    method: str = "auto",
    calibration: str | Path | None = None,
    min_survival: float = 0.97,
    max_seconds: float = 900,
    float_base: Checkpoint | None = None,
    has_head: bool = False,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge an adapter into folder/model.onnx, an int4 model without adapter, by a plan.

    Args:
        folder: holds the model; plan.toml is written beside it.
        adapter: what to merge.
        plan: auto, or a plan.toml.
        reference: Hugging Face folder or id of the float model that the int4 one was made from.
        rebuild: makes the model anew in `folder`, with the modules of the given adapter merged and those that are named
            at 8 bits, and returns how each module lies there; None where that cannot be done.
        max_bytes: of model.onnx and its data, at most; for `auto`.
        method: as `grid_merge`'s.
        calibration, min_survival, max_seconds, float_base, has_head, seed: as `grid_merge`'s.

    Returns:
        The modules' entries, and the manifest's `survival`.

    Raises:
        InputError: a plan that does not fit, or more bytes than `max_bytes` with every module merged.
        MatchError, ExportError, AdapterError, CheckpointError, DataError: what cannot be used, with the reason.
    """
    file = folder / MODEL
    graph = ir.load(file)
    found = match(graph, adapter.modules)
    refuse(file, found.values())
    made = grid_network(graph, folder, adapter, found, reference, device=None)
    own = Plan(base_mark(adapter), adapter_mark(adapter), _grid_in_words(made.grids), method, {})
    allowed = {name: _allowed(made.grids.get(name), rebuild) for name in adapter.modules}
    given = None if plan == AUTO else read_plan(plan)
    if given is not None:
        check_plan(plan, given, own, allowed, METHODS)
        own = replace(own, method=given.method)
    least = _size(folder)
    _check_size(least, max_bytes)
    bench = Bench(made, adapter, folder, reference, calibration, max_seconds, seed, float_base)
    tried = list(bench.tries(own.method, min_survival))
    best = best_of(tried, min_survival)
    ways = Ways(bench, best, float_base if rebuild else None, found)
    if given is None:
        room = float("inf") if max_bytes is None else max_bytes - least - _FUNCTION
        with progress("Planning", _MEASURED) as advance:
            settled = settle(ways.options(), ways.measure, min_survival, room, advance)
    else:
        settled = _as_given(given, allowed, ways)
    upgrades = {option.module: option.choice for option in settled.options}
    entries = _write(folder, adapter, best, ways, upgrades, rebuild, has_head)
    session(file)  # a graph that the runtime refuses is no merge
    choices = {name: upgrades.get(name, allowed[name][0]) for name in adapter.modules}
    figures = _figures(settled, choices, _size(folder), max_bytes, least, min_survival) | {
        "modules": ways.rows(choices)
    }
    survival = {**bench.report(tried, best, own.method, min_survival), "passed": figures["holds"], "plan": figures}
    # an adapter that moves codes does so by no method that can be named
    done = replace(own, method=best.method if best.method in METHODS else AUTO, choices=choices)
    _write_down(folder, done, figures, min_survival, bench.text.origin)
    return entries, survival


def _check_size(least: int, max_bytes: int | None) -> None:
    """Refuse a bound that nothing can meet."""
    if max_bytes is not None and least > max_bytes:
        raise InputError(
            f"max_bytes is {max_bytes:,}, but the model takes {least:,} with every module merged and no more to come; "
            "allow more, or quantize to fewer bits or larger groups"
        )


def _as_given(given: Plan, allowed: Mapping[str, Sequence[str]], ways: Ways) -> Settled:
    """What a plan says, measured."""
    taken = {name: choice for name, choice in given.choices.items() if choice != allowed[name][0]}
    options = [one for one in ways.options() if taken.get(one.module) == one.choice]
    return Settled(tuple(options), ways.measure(taken))


def _write_down(folder: Path, plan: Plan, figures: Mapping[str, Any], min_survival: float, text: str) -> None:
    """Write plan.toml, and say what was decided."""
    said = ", ".join(f"{count} {choice}" for choice, count in figures["choices"].items())
    log.info(
        "plan: %s; gain %.3f, cosine %.3f, %s bytes", said, figures["gain"], figures["cosine"], f"{figures['bytes']:,}"
    )
    apart = ("file", "choices", "modules")
    measured = {key: value for key, value in figures.items() if key not in apart and value is not None}
    write_plan(folder / PLAN, plan, {**measured, "min_survival": min_survival, "text": text}, figures["modules"])


def _write(
    folder: Path,
    adapter: Adapter,
    best: Tried,
    ways: Ways,
    upgrades: Choices,
    rebuild: Rebuild | None,
    has_head: bool,
) -> list[dict[str, Any]]:
    """Write every module as it was decided; their entries."""
    wide = {name: adapter.modules[name] for name, choice in upgrades.items() if choice == WIDE}
    entries: dict[str, dict[str, Any]] = {}
    if wide:
        assert rebuild is not None
        placed = rebuild(replace(adapter, modules=wide), list(wide))
        why = "added to the weight, the sum then rounded to int8"
        entries = {name: {"name": name, **placed[name], "action": "merged", "why": why} for name in wide}
    graph = ir.load(folder / MODEL)
    found = match(graph, {name: module for name, module in adapter.modules.items() if name not in wide})
    beside = {name: one for name, one in found.items() if upgrades.get(name) == BRANCH}
    for name, one in found.items():
        if name not in beside:
            entries[name] = best.write(one, ways.bench.made, folder)
    described_before = {name: one.describe() for name, one in beside.items()}
    for name, blocks in keep_branches(graph, folder, beside).items():
        why = f"its blocks stay beside the weight, as constants ({beside[name].why})"
        entries[name] = {**described_before[name], "action": "kept", "why": why, "blocks": blocks}
    if not has_head:
        put_head(graph, adapter)
    ir.save(graph, folder / MODEL)
    return [entries[name] for name in adapter.modules]


def _figures(
    settled: Settled, choices: Mapping[str, str], size: int, max_bytes: int | None, least: int, min_survival: float
) -> dict[str, Any]:
    """The manifest's `survival.plan`."""
    return {
        "file": PLAN,
        "choices": counted(choices),
        **settled.survival.figures(min_survival),
        "bytes": size,
        "max_bytes": max_bytes,
        "least_bytes": least,
        "needs_bytes": None if settled.needs is None else least + _FUNCTION + settled.needs,
    }


def _allowed(grid: Grid | None, rebuild: Rebuild | None) -> Sequence[str]:
    """What can be done with a module; first what is done when nothing else is asked for."""
    if grid is None:
        return (FLOAT,)
    own = f"int{grid.bits}"
    return (own, *((WIDE,) if rebuild is not None and grid.bits < WIDE_BITS else ()), BRANCH)


def _grid_in_words(grids: Mapping[str, Grid]) -> str:
    kinds = {(grid.bits, grid.codes.shape[-1], grid.symmetric) for grid in grids.values()}
    return "; ".join(described(*kind) for kind in sorted(kinds)) or described(0, 0, True)


def _size(folder: Path) -> int:
    """Bytes of the graph and its data."""
    model = onnx_file.find(folder / MODEL)
    assert model is not None
    return sum(path.stat().st_size for path in model.files)
