"""Add blocks to the weights of an ONNX model in place, float or quantized (MatMulNBits, or codes and DequantizeLinear).

Of a float weight only the entries that a block meets are computed. Of a quantized one only the touched groups are:
dequantized, added to, rounded anew on a grid of the same kind; blocks that were trained on this grid move its codes,
nothing is rounded. Every other byte stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.converters.onnx_aside import bytes_in_common
from diablo_export.converters.onnx_groups import corners, opened, quantized, touched
from diablo_export.converters.onnx_head import feed_parameters
from diablo_export.converters.onnx_linears import Linear
from diablo_export.converters.onnx_match import Match, match
from diablo_export.converters.onnx_stored import Held, keep, writable
from diablo_export.converters.rounding import Kept, lossy, warn_of_rounding
from diablo_export.errors import AdapterError, ExportError, indented
from diablo_export.requantize import nearest, rounded, whole_steps


def onnx_merge(file: Path, adapter: Adapter) -> list[dict[str, Any]]:
    """Merge an adapter into `file` and its external data, both changed in place; returns the modules' entries.

    Raises:
        MatchError: adapted modules that the graph does not show.
        ExportError: weights that cannot be merged into, with the reason of each.
        AdapterError: base plus blocks is more than a weight's dtype holds.
    """
    model = ir.load(file)
    found = match(model, adapter.modules)
    refuse(file, found.values())
    entries = [merge_module(one, file.parent, adapter) for one in found.values()]
    warn_of_type(entries)
    put_head(model, adapter)
    ir.save(model, file)
    return entries


def refuse(file: Path, found: Iterable[Match]) -> None:
    """Refuse weights that cannot be merged into.

    Raises:
        ExportError: lists them, with the reason of each.
    """
    found = list(found)
    common: dict[str, str] = {}
    for graph in dict.fromkeys(piece.linear.node.graph for one in found for piece in one.pieces):
        common |= bytes_in_common(graph) if isinstance(graph, ir.Graph) else {}
    faults = [fault for one in found for piece in one.pieces if (fault := _refusal(piece.linear, common))]
    faults += [f"{one.module.name}: {linear.name} is this module as well" for one in found for linear in one.again]
    if faults:
        raise ExportError(
            f"{file.name} holds weights that blocks cannot be merged into:\n{indented(dict.fromkeys(faults))}\n"
            "Give the Hugging Face folder of the base, or keep the blocks as a branch: diablo-export export"
        )


def put_head(model: ir.Model, adapter: Adapter) -> None:
    """Replace the model's classification head by the one that the adapter saved."""
    feed_parameters(model, adapter.saved)
    for name in adapter.saved:  # a merged model is not fed
        model.graph.inputs.remove(model.graph.initializers[name])


def _refusal(linear: Linear, common: Mapping[str, str]) -> str | None:
    """Why blocks cannot be merged into this node's weight, or None; `common` is what `bytes_in_common` found."""
    made = [] if linear.source is None else [linear.source.outputs[0]]
    for value in (*linear.stored, *made):
        what = "weight" if value in (linear.weight, *made) else str(value.name)
        if len(value.uses()) > 1:
            others = [use.node.name for use in value.uses() if use.node not in (linear.node, linear.source)]
            return f"{linear.name}: its {what} is shared with {', '.join(map(str, others))}, which would change as well"
        if other := common.get(str(value.name)):
            return f"{linear.name}: its {what} has bytes in common with {other}, which would change as well"
    if linear.group_index is not None:
        return f"{linear.name}: its groups are permuted (g_idx), so a block meets almost all of them"
    if linear.fault is not None:
        return f"{linear.name}: {linear.fault}"
    return None


def merge_module(one: Match, folder: Path, adapter: Adapter, held: Held | None = None) -> dict[str, Any]:
    """Merge one module; returns its entry.

    Args:
        one: the module, and where it is.
        folder: where the data of its graph is.
        adapter: the module's.
        held: where copies of the initializers are changed, see `onnx_stored.writable`; None: the data file is.
    """
    on_grid = adapter.base_grid is not None and adapter.base_grid.on_grid
    return {**one.describe(), "action": "merged", **_merge(one, folder, on_grid, held)}


def _merge(one: Match, folder: Path, on_grid: bool, held: Held | None) -> dict[str, Any]:
    if not quantized(one):
        gain = add(one, folder, held)
        return {"why": f"added to the weight ({one.why})", "weight_gain": gain}
    done = total = 0
    exact = on_grid
    for linear, found in corners(one):
        stored = opened(linear, folder, held)
        for rows, groups, added in touched(found, linear.group_size):
            old = stored.part(rows, groups)
            wanted = old.values() + added
            moved = on_grid and whole_steps(wanted, old)
            stored.put(rows, groups, nearest(wanted, old) if moved else rounded(wanted, old))
            exact = exact and moved
            done += old.scales.size
        stored.close()
        total += linear.out_features * -(-linear.in_features // linear.group_size)
    how = "moved the codes of" if exact else "requantized"
    why = f"{how} {done} of {total} groups, all that a block meets ({one.why})"
    return {"why": why, "touched_groups": done}


def add(one: Match, folder: Path, held: Held | None = None) -> float:
    """Add the blocks to a module's float weight: exact, but for its dtype; returns `Kept.gain`.

    Raises:
        AdapterError: base plus blocks is more than the dtype holds.
    """
    kept = Kept()
    for linear, found in corners(one):
        stored = writable(linear.weight, folder, held)
        weight = stored.T if linear.transposed else stored  # (out, in), a view
        wide = np.float64 if stored.dtype == np.float64 else np.float32
        for corner in found:
            before: Array = weight[corner.rows, corner.columns].astype(wide)
            delta: Array = corner.delta.astype(wide)
            with np.errstate(over="ignore"):  # an error of its own
                total: Array = (before + delta).astype(stored.dtype)
            if not np.isfinite(total).all():
                raise AdapterError(
                    f"{one.module.name}: base plus blocks overflows {stored.dtype}, the type of the weight of "
                    f"{linear.name}; merge into a float32 model, or keep the blocks as a branch: diablo-export export"
                )
            weight[corner.rows, corner.columns] = total
            kept.add(before, total.astype(wide), delta)
        keep(linear.weight, stored)
    return kept.gain


def warn_of_type(entries: Iterable[Mapping[str, Any]]) -> None:
    """Say which float weights are stored in a type that takes much of the blocks away."""
    way = "merge into a float32 model, or keep the blocks as a branch: diablo-export export"
    warn_of_rounding(lossy(entries), "the type of the model's weights", way)
