"""Merging into an int4 model by a plan: each module at the base's bits, at 8 bits, or with its blocks as a branch.

Codes are chosen by the methods of `grid_merge`. A plan is decided (`auto`) or read from a file; either way the survival
of the whole is measured, and the plan with what was measured lies in the folder as plan.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from diablo_export.adapter import Adapter
from diablo_export.base_grid import described
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log, progress
from diablo_export.converters.grid_merge import Bench, Tried, write_module
from diablo_export.converters.grid_network import grid_network
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_keep import keep_branches
from diablo_export.converters.onnx_match import Match, match
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = grid_network(graph, folder, adapter, found, reference, device)
    own = Plan(base_mark(adapter), adapter_mark(adapter), _grid_in_words(made.grids), method, {})
    allowed = {name: _allowed(made.grids.get(name), rebuild) for name in adapter.modules}
    given = None if plan == AUTO else read_plan(plan)
    if given is not None:
        check_plan(plan, given, own, allowed)
        method = given.method
    size = _size(folder)
    if given is None and max_bytes is not None and size > max_bytes:
        raise InputError(
            f"max_bytes is {max_bytes:,}, but the model takes {size:,} with every module merged and no more to come; "
            "allow more, or quantize to fewer bits or larger groups"
        )
    bench = Bench(made, adapter, folder, reference, calibration, max_seconds, seed, float_base)
    tried = list(bench.tries(method, min_survival))
    held = [one for one in tried if one.survival.holds(min_survival)]
    best = min(held or tried, key=lambda one: one.survival.distance)
    ways = Ways(bench, best, float_base if rebuild else None, found)
    if given is None:
        room = float("inf") if max_bytes is None else max_bytes - size - _FUNCTION
        with progress("Planning", _MEASURED) as advance:
            settled = settle(ways.options(), ways.measure, min_survival, room, advance)
    else:
        taken = {name: choice for name, choice in given.choices.items() if choice in (WIDE, BRANCH)}
        taken = {name: choice for name, choice in taken.items() if choice != allowed[name][0]}
        settled = Settled(
            tuple(one for one in ways.options() if taken.get(one.module) == one.choice), ways.measure(taken)
        )
    upgrades = {option.module: option.choice for option in settled.options}
    entries = _write(folder, adapter, best, ways, upgrades, rebuild, found, has_head)
    choices = {name: upgrades.get(name, allowed[name][0]) for name in adapter.modules}
    session(file)  # a graph that the runtime refuses is no merge
    survival = bench.report(tried, best, method, min_survival)
    survival["passed"] = settled.survival.holds(min_survival)
    survival["plan"] = figures = _figures(settled, choices, _size(folder), max_bytes, size)
    log.info(
        "plan: %s; gain %.3f, cosine %.3f, %s bytes", ", ".join(f"{n} {c}" for c, n in figures["choices"].items()),
        figures["gain"], figures["cosine"], f"{figures['bytes']:,}",
    )  # fmt: skip
    measured = {key: value for key, value in figures.items() if not isinstance(value, dict) and value is not None}
    measured |= {"min_survival": min_survival, "holds": survival["passed"], "text": bench.text.origin}
    write_plan(folder / PLAN, replace(own, method=best.method, choices=choices), measured, ways.rows(choices))
    return entries, survival


def _write(
    folder: Path,
    adapter: Adapter,
    best: Tried,
    ways: Ways,
    upgrades: Choices,
    rebuild: Rebuild | None,
    found: dict[str, Match],
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
            entries[name] = write_module(one, best, ways.bench.made, folder)
    described_before = {name: one.describe() for name, one in beside.items()}
    for name, blocks in keep_branches(graph, folder, beside).items():
        why = f"its blocks stay beside the weight, as constants ({beside[name].why})"
        entries[name] = {**described_before[name], "action": "kept", "why": why, "blocks": blocks}
    if not has_head:
        put_head(graph, adapter)
    ir.save(graph, folder / MODEL)
    return [entries[name] for name in adapter.modules]


def _figures(
    settled: Settled, choices: Mapping[str, str], size: int, max_bytes: int | None, least: int
) -> dict[str, Any]:
    """The manifest's `survival.plan`."""
    kept = settled.survival
    return {
        "file": PLAN,
        "choices": counted(choices),
        "gain": kept.gain,
        "cosine": kept.cosine,
        "kl": kept.kl,
        "top1_agreement": kept.agreement,
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
    return sum(
        path.stat().st_size for path in folder.iterdir() if path.name.startswith(MODEL) or path.suffix == ".data"
    )
