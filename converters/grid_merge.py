"""Merging into an int4 ONNX model by the method that keeps the fine-tune: tries, measures, writes what held.

    on_grid     codes moved by blocks that were trained to move them: nothing is rounded; what such an adapter gets
    rtn         each touched group to the nearest, on a fresh grid
    refit       scales searched and fitted for the least error of the weights
    calibrated  codes and scales for the least error of each layer's output
    distilled   from there, codes trained on the answers of the whole model
    auto        the best of rtn, refit and calibrated, which take seconds; distilled, too, where none of them holds the
                survival asked for, or none loses less than a quarter of what rounding does and distilling is quick

The reference of every figure is the same int4 model with the float branch beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log
from diablo_export.converters.grid_methods import Bench, Tried, best_of
from diablo_export.converters.grid_network import grid_network
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_match import match
from diablo_export.converters.onnx_merge import put_head, refuse


def grid_merge(
    folder: Path,
    adapter: Adapter,
    *,
    reference: str | Path,
    method: str = "auto",
    calibration: str | Path | None = None,
    min_survival: float = 0.97,
    max_seconds: float = 900,
    float_base: Checkpoint | None = None,
    has_head: bool = False,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge an adapter into folder/model.onnx, an int4 model without adapter, in place.

    Args:
        folder: holds the model; its touched groups are changed, every other byte stays.
        adapter: what to merge.
        reference: Hugging Face folder or id of the float model that the int4 one was made from.
        method: one of `grid_methods.METHODS`.
        calibration: a data file; None: text sampled from the tuned model, or random sentences for a classifier.
        min_survival: least cosine of the effect on logits; the gain may be as far from 1 as this is.
        max_seconds: about what methods may take; distillation is cut to it, or left out.
        float_base: what `rtn` rounds when at hand: the float weights and blocks in one step.
        has_head: the graph holds the adapter's saved head already.
        seed: of text and order.

    Returns:
        The modules' entries, and what was tried: the manifest's `survival`.

    Raises:
        MatchError, ExportError, AdapterError, CheckpointError, DataError: what cannot be used, with the reason.
    """
    file = folder / MODEL
    graph = ir.load(file)
    found = match(graph, adapter.modules)
    refuse(file, found.values())
    made = grid_network(graph, folder, adapter, found, reference, device=None)
    bench = Bench(made, adapter, folder, reference, calibration, max_seconds, seed, float_base)
    tried: list[Tried] = []
    for one in bench.tries(method, min_survival):
        tried.append(one)
        log.info("%s", _sentence(one))
    best = best_of(tried, min_survival)
    entries = [best.write(one, made, folder) for one in found.values()]
    if not has_head:
        put_head(graph, adapter)
    ir.save(graph, file)
    return entries, bench.report(tried, best, method, min_survival)


def _sentence(one: Tried) -> str:
    kept = one.survival
    return (
        f"{one.method}: gain {kept.gain:.3f}, cosine {kept.cosine:.3f}, KL {kept.kl:.2g} of {kept.base_kl:.2g} nats "
        f"to be kept, {one.seconds:.1f} s"
    )
