"""A module's chosen codes into the int4 file, and what the manifest says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo_export.converters.onnx_groups import write
from diablo_export.converters.onnx_match import Match
from diablo_export.converters.onnx_merge import add
from diablo_export.fingerprint import ValuesDigest
from diablo_export.requantize import Grid


def write_grid(one: Match, method: str, grid: Grid | None, base: Grid | None, folder: Path) -> dict[str, Any]:
    """Write a module's grid in place of its base's, or add its blocks to a float weight; its manifest entry."""
    if grid is None or base is None:
        add(one, folder)
        return {**one.describe(), "action": "merged", "why": f"added to the weight ({one.why})"}
    count = write(one, grid, folder)
    why = f"{method}: {count} of {base.scales.size} groups, all that a block meets ({one.why})"
    digest = ValuesDigest().add(grid.weight(one.module.in_features)).hex()  # parity holds what is stored against it
    counts = {"codes_changed": int((grid.codes != base.codes).sum()), "codes": grid.codes.size}
    counts |= {"touched_groups": count, "disturbed_weights": _disturbed(grid, base, one)}
    return {**one.describe(), "action": "merged", "why": why, **counts, "values_xxh3": digest}


def _disturbed(grid: Grid, base: Grid, one: Match) -> int:
    """Weights that no block meets, in groups that one does, whose value changed."""
    inputs = one.module.in_features
    moved = grid.weight(inputs) != base.weight(inputs)
    for columns, rows in one.module.shape.slices():
        moved[rows, columns] = False
    return int(moved.sum())
