"""The float road: blocks into float weights, then every weight quantized by k-quant, HQQ, GPTQ or learned rounding.

What rounds the base rounds the merge as well, so nothing of the model stays as another program's int4 had it. Survival
is measured as in any merge, against the base quantized in the same way with the float branch beside it; how far all of
it is from the float tuned model is measured, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from diablo_export.adapter import AdaptedModule, Adapter, base_weight
from diablo_export.algorithms import LEARNED, Algorithm
from diablo_export.blockdiag import Array, add_to_weight
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log
from diablo_export.converters import budget
from diablo_export.converters.calibration import Text, text_for
from diablo_export.converters.grid_network import GridNetwork, grid_network, target
from diablo_export.converters.grid_report import against_runtime, reported
from diablo_export.converters.learned_road import TRAINED_COPIES, learned_road
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_graph import Graph
from diablo_export.converters.onnx_match import match
from diablo_export.converters.sizes import memory_fault
from diablo_export.errors import InputError
from diablo_export.fingerprint import ValuesDigest, fingerprint
from diablo_export.measure.metrics import Comparison
from diablo_export.measure.survival import Judge, of_outputs
from diablo_export.measure.torch_runner import context_length
from diablo_export.requantize import Grid
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import logits
from diablo_export.trainer.grid import grid_layers
from diablo_export.trainer.layer import set_enabled
from diablo_export.trainer.model import load_tuned, vocabulary_size
from diablo_export.trainer.moments import InputMoments, input_moments

_LENGTH = 128  # tokens of a sequence
_JUDGED, _FITTED = 16, 512  # sequences: to measure on, to take moments of and to train on
_SHORT = 16  # so many more of a classifier's, which give one answer each
_TEXT_SHARE, _PASSES = 0.4, 4  # of the seconds for so many readings of the text
_LOGITS = 1 << 26  # that are kept of the judged text

Build = Callable[[Algorithm], Graph]


def float_road(
    folder: Path,
    adapter: Adapter,
    source: Checkpoint,
    build: Build,
    *,
    method: str,
    calibration: str | Path | None = None,
    min_survival: float = 0.97,
    max_seconds: float = 900,
    seed: int = 0,
) -> tuple[Graph, list[dict[str, Any]], dict[str, Any]]:
    """Have a merged model built and quantized by `method`, and measure what it keeps.

    Args:
        folder: where `build` writes it.
        adapter: what is merged.
        source: the float base.
        build: makes the graph of base and adapter, quantized by an algorithm.
        method: one of `algorithms.ALGORITHMS`.
        calibration, min_survival, max_seconds, seed: as `grid_merge`'s.

    Returns:
        The graph, the modules' entries, and the manifest's `survival`.

    Raises:
        InputError: an adapter whose blocks are whole steps of a grid. DataError: text that cannot be used.
    """
    _check(adapter, method)
    start = time.perf_counter()
    tuned = _Tuned(source, adapter, calibration, max_seconds, seed)
    moments = InputMoments(tuned.network, tuned.text.fitted, batch_size=tuned.batch, pad=tuned.pad)
    algorithm = Algorithm(method, moments)
    built = build(algorithm)
    steps: dict[str, int] = {}
    if method == LEARNED:
        steps = _learned(folder, tuned, source, max_seconds, seed)
        built = replace(built, hashes={})  # the file is another one now
    graph = ir.load(folder / MODEL)
    found = match(graph, {name: _merged(source, module) for name, module in adapter.modules.items()})
    made = grid_network(graph, folder, adapter, found, source.folder)
    bases = {name: _base(algorithm, name, grid, source) for name, grid in made.grids.items()}
    kept = _Kept(tuned, made, bases)
    row = {"method": method, **kept.figures(min_survival), **steps, "seconds": round(time.perf_counter() - start, 2)}
    log.info(
        "%s: gain %.3f, cosine %.3f, KL to the float tuned model %.2g", method, row["gain"], row["cosine"],
        row["tuned_kl"],
    )  # fmt: skip
    alike = kept.against(folder, source)
    survival = reported([row], method, method, row["holds"], min_survival, tuned.text, alike)
    by = "gptq" if method == LEARNED else method
    survival["reference"] = f"the base quantized by {by} with the float branch, in torch"
    return built, [_entry(module, built, method, kept) for module in adapter.modules.values()], survival


def _check(adapter: Adapter, method: str) -> None:
    """Refuse blocks that are whole steps of a grid; warn where a merge by this method is less than it seems."""
    if adapter.base_grid is not None and adapter.base_grid.on_grid:
        raise InputError(
            f"--method {method}: the adapter moves the codes of the grid that it was trained on; leave out --method, "
            "and it is merged exactly"
        )
    if method == "hqq":
        log.warning(
            "hqq has zero points between the codes, for which onnxruntime has no fast kernel on a CPU: a token takes "
            "many times as long; gptq has none of them"
        )
    if adapter.base_grid is not None:
        log.warning(
            "the adapter was trained beside %s weights, each rounded to the nearest, and %s rounds the base in another "
            "way: what it learned of those weights' errors does not fit it. For the trained model leave out --method",
            adapter.base_grid, method,
        )  # fmt: skip


def _learned(folder: Path, tuned: _Tuned, source: Checkpoint, max_seconds: float, seed: int) -> dict[str, int]:
    """Train the codes of the file that was built; how many steps that were."""
    fault = memory_fault(source, copies=TRAINED_COPIES)
    if fault is not None:
        log.warning("learned layer by layer, which keeps less than all layers together: %s", fault)
    seconds = (1 - _TEXT_SHARE) * max_seconds
    how: dict[str, Any] = {"whole": fault is None, "seconds": seconds, "pad": tuned.pad, "seed": seed}
    return learned_road(folder, tuned.network, tuned.text.fitted, **how)


class _Tuned:
    """The float tuned model, its text, and what it says to it with its adapter and without."""

    def __init__(
        self, source: Checkpoint, adapter: Adapter, calibration: str | Path | None, seconds: float, seed: int
    ) -> None:
        self.adapter = adapter
        self.network, self.tokenizer = load_tuned(source.folder, adapter)
        self.pad = int(self.tokenizer.pad_token_id or 0)
        self.text = self._text(calibration, seconds, seed)
        longest = max(len(item.ids) for item in [*self.text.judged, *self.text.fitted])
        self.batch = max(1, budget.batch_tokens(self.network) // longest)
        ordered = sorted(self.text.judged, key=lambda item: len(item.ids))  # little padding
        self.batches = [ordered[at : at + self.batch] for at in range(0, len(ordered), self.batch)]
        set_enabled(self.network, False)
        self.without = self.logits(self.network)
        set_enabled(self.network, True)
        self.answers = self.logits(self.network)

    @torch.inference_mode()
    def logits(self, network: nn.Module, state: str = "grid") -> list[Array]:
        """Of each batch of the judged text."""
        return [np.asarray(logits(network, batch, self.pad, state).cpu()) for batch in self.batches]

    def _text(self, calibration: str | Path | None, seconds: float, seed: int) -> Text:
        length = min(_LENGTH, context_length(self.network))
        vocabulary = vocabulary_size(self.network)
        item = Encoded(np.arange(length, dtype=np.int32) % min(vocabulary, 100), np.ones(length, np.bool_))
        per_token = budget.seconds_per_token(self.network, [item], self.pad)
        sequences = seconds * _TEXT_SHARE / (per_token * length * _PASSES)
        classifier = self.adapter.classifies
        many = _SHORT if classifier else 1
        judged = many * int(max(2, min(_JUDGED, sequences / 4, _LOGITS / (vocabulary * length))))
        how: dict[str, Any] = {"length": length, "classifier": classifier, "judged": judged}
        how["fitted"] = many * int(min(_FITTED, max(4, sequences - _JUDGED)))
        return text_for(calibration, self.network, self.tokenizer, labels=self.adapter.labels, seed=seed, **how)


class _Kept:
    """What a quantized merge says to the same text, and its base quantized so, with the branch beside it."""

    def __init__(self, tuned: _Tuned, made: GridNetwork, bases: Mapping[str, Grid]) -> None:
        self.tuned, self.made, self.bases = tuned, made, bases
        self.layers = grid_layers(made.network)
        for name, base in bases.items():
            self.layers[name].lay(base, made.grids[name])
        sizes = {name: base.codes.shape[-1] for name, base in bases.items()}
        self.moments = input_moments(made.network, tuned.text.fitted, sizes, batch_size=tuned.batch, pad=tuned.pad)

    def figures(self, least: float) -> dict[str, Any]:
        """A row of the manifest's `survival.tried`."""
        text = self.tuned.text
        judge = Judge(self.made.network, text.judged, self.tuned.batch, self.tuned.pad, truth=text.true)
        kept = judge.measure().figures(least)
        sums = Comparison()
        said = zip(self.tuned.answers, self.tuned.without, self.tuned.logits(self.made.network), strict=True)
        for on, off, now in said:
            sums.update(on, off, now, off)
        modules = {name: self.of_module(name) for name in self.bases}
        changed = [one["codes_changed"] * self.bases[name].codes.size for name, one in modules.items()]
        total = sum(base.codes.size for base in self.bases.values())
        tuned_kl, share = sums.divergence()["mean"], sum(changed) / max(1, total)
        return {**kept, "tuned_kl": tuned_kl, "codes_changed": share, "modules": modules}

    def of_module(self, name: str) -> dict[str, float]:
        """Gain and cosine of the module's output, and the share of its codes that the adapter changed."""
        base, grid = self.bases[name], self.made.grids[name]
        wanted = target(self.tuned.adapter.modules[name], base)
        gain, cosine = of_outputs(self.layers[name].shape, base, grid, wanted, self.moments[name])
        return {"gain": gain, "cosine": cosine, "codes_changed": float((grid.codes != base.codes).mean())}

    def against(self, folder: Path, source: Checkpoint) -> float:
        """Cosine of the merge's logits in the network and in onnxruntime, on one sequence."""
        item = max(self.tuned.text.judged, key=lambda each: len(each.ids))
        with torch.inference_mode():
            ours = logits(self.made.network, [item], self.tuned.pad, "grid").cpu().numpy()
        return against_runtime(ours, item, folder, source.folder)


def _merged(source: Checkpoint, module: AdaptedModule) -> AdaptedModule:
    """A module that is known by its merged weight."""
    weight = np.asarray(add_to_weight(base_weight(source, module.name), module.blocks), np.float32)
    return replace(module, fingerprint=fingerprint(weight))


def _base(algorithm: Algorithm, name: str, like: Grid, source: Checkpoint) -> Grid:
    """What the algorithm makes of a module without its blocks."""
    return algorithm.grid(name, like.bits, like.codes.shape[-1], like.symmetric, base_weight(source, name))


def _entry(module: AdaptedModule, built: Graph, method: str, kept: _Kept) -> dict[str, Any]:
    """A module's entry in the manifest."""
    name, why = module.name, f"added to the weight; all weights then quantized by {method}"
    entry = {"name": name, **built.modules[name], "action": "merged", "why": why, "algorithm": method}
    grid = kept.made.grids.get(name)
    if grid is None:
        return entry
    return {**entry, "values_xxh3": ValuesDigest().add(grid.weight(module.in_features)).hex()}
