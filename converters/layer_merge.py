"""Merging into an int4 ONNX model that is too large to be run whole: distilled layer after layer.

Of the float model one decoder layer at a time is loaded, given the int4 weights of the file, distilled on what it gives
beside its float blocks, written, and forgotten. Beside it there are what lies outside of the layers, and the hidden
states of the text. Survival is measured on logits all the same: base, branch and merged hidden states pass through
every layer together.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log, progress
from diablo_export.converters.calibration import Text, given_text, random_text
from diablo_export.converters.grid_network import lay, target
from diablo_export.converters.grid_report import against_runtime, reported
from diablo_export.converters.grid_write import write_grid
from diablo_export.converters.merge_method import LAYERWISE
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_groups import scale_type
from diablo_export.converters.onnx_match import Match, match
from diablo_export.converters.onnx_merge import put_head, refuse
from diablo_export.measure.survival import of_logits
from diablo_export.measure.torch_runner import context_length
from diablo_export.quantization import Float32
from diablo_export.requantize import Grid, refitted, ungrouped, with_touched
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.grid import GridLinear, State, grid_layers
from diablo_export.trainer.layerwise import Batch, Layers, layers_path
from diablo_export.trainer.model import fill, load_empty

STEPS, _LEAST_STEPS = 150, 40  # of Adam for each layer
_LENGTH, _BATCH = 128, 8  # tokens of a sequence; sequences at once
_JUDGED, _FITTED = 16, 256  # sequences
_HIDDEN = 1 << 26  # numbers of hidden states for each of the two that are fitted: 256 MB
_PASSES = 3  # of a layer in a step: forward, and a backward pass that is worth two
_STATES: tuple[State, ...] = ("base", "branch", "grid")


def layer_merge(
    folder: Path,
    adapter: Adapter,
    *,
    reference: str | Path,
    calibration: str | Path | None = None,
    min_survival: float = 0.97,
    max_seconds: float = 900,
    has_head: bool = False,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge an adapter into folder/model.onnx, an int4 model without adapter, in place; as `grid_merge`.

    Args:
        calibration: a data file; None: sentences of random tokens, as a model that is never whole cannot write.
        max_seconds: about what it may take; steps are cut to it, to 40 for each layer at the least.

    Raises:
        ExportError: the model has no list of layers that can be run one after the other.
        MatchError, AdapterError, CheckpointError, DataError: what cannot be used, with the reason.
    """
    began, file = time.perf_counter(), folder / MODEL
    graph = ir.load(file)
    parts = _Parts(graph, folder, adapter, match(graph, adapter.modules), Checkpoint.open(reference))
    refuse(file, parts.found.values())
    adapter.check_base(parts.checkpoint)
    network, tokenizer = load_empty(parts.checkpoint.folder, adapter.task, labels=adapter.labels or None)
    path = layers_path(network, adapter.modules)
    layers = Layers(network, path)
    parts.load(network, "")
    text = _text(network, tokenizer, calibration, adapter.classifies, seed)
    pad = int(tokenizer.pad_token_id or 0)
    judged = [layers.listen(items, pad, _STATES) for items in _batches(text.judged)]
    fitted = [layers.listen(items, pad, ("branch", "grid")) for items in _batches(text.fitted)]
    steps = 0
    with progress("Layers", len(layers.layers)) as advance:
        for index, skeleton in enumerate(layers.layers):
            layer, where = copy.deepcopy(skeleton), f"{path}.{index}"
            parts.load(layer, where)
            steps = steps or _affordable(layers, layer, fitted, max_seconds)
            losses = layers.distil(index, layer, fitted, steps=steps, seed=seed)
            log.debug("%s: share of its outputs that is missed, step by step: %s", where, losses)
            _pass_on(layers, index, layer, judged)
            parts.write(layer, where)
            advance(1)
    parts.write(network, "")
    if not has_head:
        put_head(graph, adapter)
    ir.save(graph, file)
    kept = of_logits(tuple(layers.answer(batch, state).cpu().numpy() for state in _STATES) for batch in judged)
    last = _batches(text.judged)[-1][-1]
    rows = 1 if adapter.classifies else len(last.ids)
    alike = against_runtime(layers.answer(judged[-1], "grid")[-rows:].cpu().numpy(), last, folder, reference)
    row = {"method": LAYERWISE, **kept.figures(min_survival), "codes_changed": parts.changed, "steps": steps}
    row |= {"seconds": round(time.perf_counter() - began, 2), "modules": {}}
    entries = [parts.entries[name] for name in parts.found]
    return entries, reported([row], LAYERWISE, LAYERWISE, kept.holds(min_survival), min_survival, text, alike)


class _Parts:
    """Parts of the float model with the weights of the int4 file: loaded, and written when they are merged."""

    def __init__(
        self, graph: ir.Model, folder: Path, adapter: Adapter, found: dict[str, Match], checkpoint: Checkpoint
    ) -> None:
        self.found, self.checkpoint = found, checkpoint
        self.entries: dict[str, dict[str, Any]] = {}
        self._graph, self._folder, self._adapter = graph, folder, adapter
        self._grids: dict[str, Grid] = {}

    def load(self, part: nn.Module, path: str) -> None:
        """Load a part; each of its layers with blocks begins at the float weights, on scales fitted to these."""
        fill(part, path, self.checkpoint, self._adapter.saved)
        grids, _ = lay(part, path, self._graph, self._folder, self._adapter, self.found)
        self._grids |= grids
        part.to("cuda" if torch.cuda.is_available() else "cpu")
        for name, layer in _adapted(part, path):
            if name in grids:
                wanted = target(self._adapter.modules[name], grids[name])
                dtype = scale_type(self.found[name])
                start = with_touched(grids[name], wanted, layer.shape, partial(_refitted, dtype=dtype))
                layer.begin(start, ungrouped(wanted, layer.shape.in_features))

    def write(self, part: nn.Module, path: str) -> None:
        """Write the codes of a part into the file, and forget it."""
        for name, layer in _adapted(part, path):
            base = self._grids.pop(name, None)
            chosen = None if base is None else layer.finish()
            self.entries[name] = write_grid(self.found[name], LAYERWISE, chosen, base, self._folder)

    @property
    def changed(self) -> float:
        """The share of the adapted layers' codes that differ from the base's."""
        changed, total = (sum(one.get(name, 0) for one in self.entries.values()) for name in ("codes_changed", "codes"))
        return float(changed / max(1, total))


def _adapted(part: nn.Module, path: str) -> list[tuple[str, GridLinear]]:
    """The layers with blocks in a part of the network, by their path in the whole."""
    return [(f"{path}.{name}".removeprefix("."), layer) for name, layer in grid_layers(part).items()]


def _refitted(target: Float32, old: Grid, number: int, *, dtype: Any) -> Grid:
    return refitted(target, old, dtype)


def _text(network: Any, tokenizer: Any, calibration: str | Path | None, classifier: bool, seed: int) -> Text:
    length = min(_LENGTH, context_length(network))
    width = int(network.get_input_embeddings().embedding_dim)
    fitted = int(max(_BATCH, min(_FITTED, _HIDDEN // (length * width))))
    if calibration is not None:
        return given_text(calibration, tokenizer, length=length, classifier=classifier, judged=_JUDGED, fitted=fitted)
    return random_text(tokenizer, length=length, judged=_JUDGED, fitted=fitted, seed=seed, whole=not classifier)


def _batches(items: Sequence[Encoded]) -> list[Sequence[Encoded]]:
    """Sequences that are run together, of about one length."""
    ordered = sorted(items, key=lambda item: len(item.ids))
    return [ordered[start : start + _BATCH] for start in range(0, len(ordered), _BATCH)]


@torch.no_grad()
def _affordable(layers: Layers, layer: nn.Module, batches: Sequence[Batch], seconds: float) -> int:
    """Steps for each layer, so that all keep to the seconds: from the time that the first takes for a batch."""
    took = 0.0
    for _ in range(2):  # the first run is slower
        start = time.perf_counter()
        layers.run(0, layer, batches[0], "branch")[0, 0].cpu()  # a GPU runs on its own until it is asked for numbers
        took = time.perf_counter() - start
    passes = seconds / (took * len(layers.layers)) - 2 * len(batches)  # those that go on to the next layer
    return int(max(_LEAST_STEPS, min(STEPS, passes / _PASSES)))


@torch.no_grad()
def _pass_on(layers: Layers, index: int, layer: nn.Module, batches: Sequence[Batch]) -> None:
    for batch in batches:
        for state in _STATES:
            batch.hidden[state] = layers.run(index, layer, batch, state)
