"""Where an export goes wrong: each module's error on the same input, what it inherits, and what is left of its adapter.

A second torch pass puts what every module of the export read and gave in the place of torch's own values. Then each
module stands beside its twin on the same input, and that input beside what torch makes of the outputs before it: norms,
attention, rotary positions and cache. Neither is blurred by errors further up, so both are as small in an int4
export as in a float one, and the first that is not is where the export goes wrong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log, progress
from diablo_export.measure import exported, sources
from diablo_export.measure.exported_base import rebuild
from diablo_export.measure.given_base import given_base
from diablo_export.measure.metrics import decibels
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.places import Graph
from diablo_export.measure.prompts import Ids, Sample
from diablo_export.measure.stored import Audit, audit
from diablo_export.measure.taps import OnnxTaps, Outputs, Seen, TorchTaps, check, open_session
from diablo_export.trainer.layer import DiabloLinear, is_linear
from diablo_export.trainer.model import load_base

TOKENS, _FEWEST = 256, 64  # looked at: at most so many, and a sixteenth of what was compared, but not fewer than these
_PART = 16
_STEPS = 4  # of the first sequence, one at a time on the cache
_LONGEST, _SHORTEST = 128, 16  # tokens of a sequence
_SHARE = 0.25  # of the reference's own memory that the values of one sequence may take
_LEAST = 1 << 26  # bytes that they may take in any case

# Decibels that the worst row of an input must reach. Float32 norms and attention are measured at 95 and more; a rotary
# table that is off by one position gives 5 to 40. Float16 rounds by 66 dB, and a residual stream is some hundred sums.
_INPUT = {"fp16": 30.0, "fp32": 60.0}
# The same of the worst column of an output, against the mean column. Float32 sums are measured at 100 and more; one
# block of 16 × 16 with its signs turned gives 10 to 30. bfloat16 rounds weights by 54 dB, and float16 by 66.
_OUTPUT = {"fp32": 60.0, "fp16": 35.0, "bf16": 30.0}
# Quantized, and less what the stored weights explain, only the rounding of the inputs to int8 is left. The worst column
# is measured at 1 to 14 times what rounding to nearest is expected to leave; a lost bias or branch at hundreds.
_KERNEL = 60.0
# Blocks in int8 are off by up to 2 % of an effect that is rarely larger than the output itself: 34 dB
_BLOCKS = {"int8": 25.0, "fp16": 50.0}
# Steps of the grid: rounding to nearest leaves 0.29 on average and 0.5 at worst. A zero point off by one is 1.04, a
# doubled scale or turned codes are several.
_WEIGHTS = 0.9
# Where codes were fitted to outputs they stand for the quantized base with the branch beside it, so its rounding and
# their own add up: twice the squared error of rounding to nearest. Measured 0.9 to 2.9; weights are 2 to 3 steps large,
# so wrong ones are off by 12 times their square, 50 and more. One wrong group of many is not seen so; for that the
# merge wrote down a digest of the values that it chose.
_FITTED = 8.0
_GAIN = 0.5  # of an adapter in the weights, from 1: rounding noise moves it by 0.05 on a layer of 128 × 128


FAULTS = {
    "input": "its input is not what the outputs before it make: a norm, attention, rotary positions or the cache",
    "weights": "its stored weights are further from the tuned ones than rounding takes them, or not what was merged",
    "output": "its output is not what its stored weights, bias and blocks make of its input",
    "adapter": "its weights hold another share of the adapter than all of it",
}


@dataclass
class _Sums:
    """Running sums of one module."""

    signal: float = 0.0
    inherited: float = 0.0
    local: float = 0.0
    local_signal: float = 0.0
    effect: float = 0.0
    wanted: float = 0.0
    product: float = 0.0
    input_db: float = math.inf
    output_db: float = math.inf
    audit: Audit | None = None
    kernel: float = 0.0


@dataclass(frozen=True)
class Findings:
    """Per module, in the order of the network.

    Attributes:
        rows: the report's `modules`.
        first: the first module with a fault, or None.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    first: str | None = None

    @property
    def faulty(self) -> int:
        """How many modules have a fault."""
        return sum(row["fault"] is not None for row in self.rows)


def look(
    out: Path,
    manifest: Mapping[str, Any],
    model: nn.Module,
    name: str,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    threads: int | None = None,
    lost: bool = False,
) -> Findings:
    """Compare an export with the tuned model module by module.

    Args:
        out: the output folder.
        manifest: its manifest.
        model: the tuned model in torch.
        name: of the adapter in the manifest.
        adapter: the adapter.
        samples: what was compared; of the longest of them up to TOKENS tokens are run.
        threads: of onnxruntime.
        lost: the adapter's effect on the logits is not what it should be: look for it in the weights, too.

    Raises:
        ExportError: onnxruntime refuses the graph.
    """
    linear = _linear(model)
    with_adapter, without = _export(out, manifest, model, name, adapter, linear, threads)
    watched = list(with_adapter.places if isinstance(with_adapter, OnnxTaps) else linear)
    tuned, base = TorchTaps(model, True, watched), TorchTaps(model, False, watched)
    runs = _pieces(samples, _tokens(model, linear, watched), _decodes(with_adapter, adapter))
    digests = {entry["name"]: entry.get("values_xxh3") for entry in manifest["modules"]}
    sums: dict[str, _Sums] = {}
    limits = _limits(out, manifest)
    merged = None if sources.is_branch(manifest) else sources.merged_part(manifest, adapter)
    hashed = {module for module, digest in digests.items() if digest}
    beside = _Beside(sums, linear, with_adapter, merged, limits[1], _is_fitted(manifest), hashed)
    with progress("Looking into modules", 5 * len(runs)) as advance:
        for pieces in runs:
            seen, wanted = list(with_adapter.see(pieces)), list(tuned.outputs(pieces))
            check(seen[0], wanted[0], {module: _inputs(linear[module]) for module in watched})
            for module in wanted[0]:  # in the network's order
                sums.setdefault(module, _Sums())
            advance(2)
            _add_effects(sums, seen, without.outputs(pieces), wanted, base.outputs(pieces))
            del wanted
            advance(2)
            tuned.beside(pieces, seen, beside)
            advance(1)
    judged = not any(".onnx" in file for file in (manifest.get("base") or {}).get("files") or {})
    rows = [_row(module, one, limits, lost, judged, digests.get(module)) for module, one in sums.items()]
    first = next((row for row in rows if row["fault"]), None)
    if first is not None:
        log.warning("the first module that diverges: %s (%s)", first["name"], FAULTS[first["fault"]])
    return Findings(rows, first["name"] if first else None)


@dataclass(frozen=True)
class _Beside:
    """Called with every module's twin values; adds what they say to the sums."""

    sums: Mapping[str, _Sums]
    linear: Mapping[str, nn.Module]
    taps: OnnxTaps | TorchTaps
    merged: Adapter | None
    output_db: float
    fitted: bool
    hashed: Collection[str]  # modules whose stored values have a digest to be held against
    weighed: set[str] = field(default_factory=set)  # whose weights were looked at

    def __call__(self, name: str, own_x: Array, x: Array, own_y: Array, y: Array) -> None:
        sums = self.sums[name]
        noise, signal = _squares(x - own_x, 1), _squares(own_x, 1)  # by row
        sums.input_db = min(sums.input_db, _worst(signal, noise))
        error, power = y - own_y, _squares(own_y, 0)  # by column
        sums.local += float(_squares(error, 0).sum())
        sums.local_signal += float(power.sum())
        if name not in self.weighed:  # on the first piece of the first sequence: it has the most rows
            self.weighed.add(name)
            self._weigh(name, x, error, float(power.mean()))
        if sums.audit is None:
            columns = _squares(error, 0)
            sums.output_db = min(sums.output_db, _worst(np.full_like(columns, power.mean()), columns))

    def _weigh(self, name: str, x: Array, error: Array, power: float) -> None:
        """Look at the stored weights, and at what of the output's error they do not explain."""
        if not isinstance(self.taps, OnnxTaps):
            return
        place, module = self.taps.places[name], self.merged.modules.get(name) if self.merged else None
        more = {"fitted": self.fitted, "hashed": name in self.hashed}
        looked = audit(self.taps.graph, place, self.linear[name], module, x, **more)
        if looked is not None:
            self.sums[name].audit, expected = looked
            columns = _squares(error - expected.error, 0)
            rounding = power * 10 ** (-self.output_db / 10)  # of the float sums
            self.sums[name].kernel = float((columns / (expected.noise + rounding / _KERNEL + 1e-30)).max())


def _export(
    out: Path,
    manifest: Mapping[str, Any],
    model: nn.Module,
    name: str,
    adapter: Adapter,
    linear: Mapping[str, nn.Module],
    threads: int | None,
) -> tuple[OnnxTaps | TorchTaps, OnnxTaps | TorchTaps]:
    """The export with its adapter on and off, watched."""
    if not sources.is_onnx(out):
        other, _ = load_base(out, "text-classification" if adapter.task_type == "SEQ_CLS" else "causal-lm")
        return TorchTaps(other, True, list(linear)), TorchTaps(model, False, list(linear))
    graph, shape, entries = Graph(out / "model.onnx"), cache_shape(out), list(manifest["modules"])
    biased = {module: getattr(layer, "bias", None) is not None for module, layer in linear.items()}
    places = graph.places(entries, biased)
    if sources.is_branch(manifest):
        session = open_session(graph, places, threads)
        on, off, _ = exported.states(manifest, session, out, name, shape)
        return OnnxTaps(graph, on, places), OnnxTaps(graph, off, places)
    given = given_base(manifest, adapter)
    if given is not None:
        before = Graph(given)  # it has no branches, so its values may have other names
        there = before.places(entries, biased)
        pairs = ((graph, places), (before, there))
        on, off = (OnnxRunner(open_session(*pair, threads), cache_shape=shape) for pair in pairs)
        return OnnxTaps(graph, on, places), OnnxTaps(before, off, there)
    rebuilt = rebuild(out / "model.onnx", entries, Checkpoint.open(str(model.name_or_path)), adapter)
    sessions = (open_session(graph, places, threads, values) for values in (None, rebuilt.initializers))
    on, off = (OnnxRunner(session, cache_shape=shape) for session in sessions)
    return OnnxTaps(graph, on, places), OnnxTaps(graph, off, places)


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by path; an adapted one as the layer under its blocks."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, DiabloLinear):
            found[name] = module.base
        elif is_linear(module) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


def _is_fitted(manifest: Mapping[str, Any]) -> bool:
    """Whether the codes were chosen for the least error of outputs, which takes them steps away from the weights."""
    return (manifest.get("survival") or {}).get("method") in ("calibrated", "distilled")


def _decodes(taps: OnnxTaps | TorchTaps, adapter: Adapter) -> bool:
    return bool(taps.runner.empty_cache()) if isinstance(taps, OnnxTaps) else adapter.task_type == "CAUSAL_LM"


def _tokens(model: nn.Module, linear: Mapping[str, nn.Module], watched: Sequence[str]) -> int:
    """How long a sequence may be: the inputs of one model and the outputs of four are held at once."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    sizes = ((_inputs(linear[name]), linear[name].get_parameter("weight").numel()) for name in watched)
    per_token = sum(4 * (inputs + 4 * (count // inputs)) for inputs, count in sizes)
    return min(_LONGEST, max(_SHORTEST, int(max(_LEAST, _SHARE * weights)) // max(1, per_token)))


def _inputs(layer: nn.Module) -> int:
    """How many inputs a linear layer has."""
    return int(layer.get_parameter("weight").shape[0 if isinstance(layer, Conv1D) else 1])


def _pieces(samples: Sequence[Sample], longest: int, decodes: bool) -> list[list[Ids]]:
    """The longest sequences; the first as its beginning and, where there is a cache, a few single tokens behind it.

    Of a large model a token alone takes as long as a whole sequence, so no more of them than tell of a broken cache.
    """
    runs: list[list[Ids]] = []
    left = min(TOKENS, max(_FEWEST, sum(len(sample.ids) for sample in samples) // _PART))
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        ids = sample.ids[: min(longest, left)]
        if runs and len(ids) < min(_SHORTEST, len(sample.ids)):
            break
        left -= len(ids)
        cut = len(ids) - _STEPS if decodes and not runs and len(ids) > 2 * _STEPS else len(ids)
        runs.append([ids[:cut], *(ids[at : at + 1] for at in range(cut, len(ids)))])
    return runs


def _add_effects(
    sums: Mapping[str, _Sums],
    on: Sequence[Seen],
    off: Iterable[Outputs],
    tuned: Sequence[Outputs],
    base: Iterable[Outputs],
) -> None:
    """Add what both runs say of the adapter, a piece each; those without it are asked for one piece at a time."""
    for exported_on, exported_off, torch_on, torch_off in zip(on, off, tuned, base, strict=True):
        for name, one in sums.items():
            found, wanted = exported_on[name][1], torch_on[name]
            one.signal += float(_squares(wanted, 0).sum())
            one.inherited += float(_squares(found - wanted, 0).sum())
            effect = (found - exported_off[name]).astype(np.float64)
            asked = (wanted - torch_off[name]).astype(np.float64)
            one.effect += float((effect**2).sum())
            one.wanted += float((asked**2).sum())
            one.product += float((effect * asked).sum())


def _limits(out: Path, manifest: Mapping[str, Any]) -> tuple[float, float]:
    """What the worst row of an input and the worst column of a float module's output must reach."""
    half = sources.is_onnx(out) and "fp16" in (
        manifest.get("precision"),
        (manifest.get("options") or {}).get("precision"),
    )
    stored = sources.precision(out, manifest)
    output = min(_OUTPUT["fp16" if half else "fp32"], _OUTPUT.get(stored, math.inf))
    blocks = _BLOCKS.get(sources.block_dtype(manifest) or "", math.inf)
    return _INPUT["fp16" if half else "fp32"], min(output, blocks)


def _row(
    name: str, sums: _Sums, limits: tuple[float, float], lost: bool, judged: bool, digest: str | None
) -> dict[str, Any]:
    looked = sums.audit
    fault = None
    if sums.input_db < limits[0]:
        fault = "input"
    elif looked is not None and not _as_merged(looked, judged, digest):
        fault = "weights"
    elif sums.output_db < limits[1] or not sums.kernel <= _KERNEL:
        fault = "output"
    elif lost and looked is not None and abs(looked.gain - 1) > _GAIN:
        fault = "adapter"
    norm = math.sqrt(sums.wanted * sums.effect)
    return {
        "name": name,
        "local_sqnr_db": decibels(sums.local_signal, sums.local),
        "inherited_sqnr_db": decibels(sums.signal, sums.inherited),
        "survival_gain": sums.product / sums.wanted if sums.wanted else math.nan,
        "survival_cosine": sums.product / norm if norm else math.nan,
        "input_sqnr_db": sums.input_db,
        "output_sqnr_db": sums.output_db if looked is None else None,
        "worst_group_steps": looked.worst if looked is not None else None,
        "fitted_error_ratio": looked.fitted if looked is not None else None,
        "kernel_noise_ratio": sums.kernel if looked is not None else None,
        "fault": fault,
    }


def _as_merged(looked: Audit, judged: bool, digest: str | None) -> bool:
    """Whether weights are what the merge chose, where it said so, and as near to tuned's as rounding takes them."""
    near = looked.worst <= _WEIGHTS and looked.fitted <= _FITTED
    return digest in (None, looked.digest) and (near or not judged)


def _squares(values: Array, axis: int) -> Array:
    """Sums of squares along an axis, in float64."""
    squares: Array = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", *[values.astype(np.float64)] * 2)
    return squares


def _worst(signal: Array, noise: Array) -> float:
    """The least signal to noise of several, in decibels; −inf where one is no number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.where(noise == 0, 0, noise / signal).max())
    if not math.isfinite(ratio):
        return -math.inf
    return decibels(1.0, ratio)
