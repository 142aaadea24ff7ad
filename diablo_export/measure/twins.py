"""Every module of an export beside its twin in torch, on the same input: local error, inheritance, survival, faults.

A second torch pass puts what every module of the export read and gave in the place of torch's own values. Then each
module stands beside its twin on the same input, and that input beside what torch makes of the outputs before it: norms,
attention, rotary positions and cache. Neither is blurred by errors further up, so both are as small in an int4
export as in a float one, and the first that is not is where the export goes wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from diablo_export.adapter import AdaptedModule
from diablo_export.blockdiag import Array
from diablo_export.console import log, progress
from diablo_export.measure.experts import audit_experts
from diablo_export.measure.metrics import decibels
from diablo_export.measure.prompts import Ids, Sample
from diablo_export.measure.stored import Audit, Fitted, audit
from diablo_export.measure.taps import EMBEDDINGS, OnnxTaps, Outputs, Seen, TorchTaps, check
from diablo_export.trainer.experts import is_experts
from diablo_export.trainer.layer import features

TOKENS, _FEWEST = 256, 64  # looked at: at most so many, and a sixteenth of what was compared, but not fewer than these
_PART = 16
_STEPS = 4  # of the first sequence, one at a time on the cache
_LONGEST, _SHORTEST = 128, 16  # tokens of a sequence
_SHARE = 0.25  # of the reference's own memory that the values of one sequence may take
_LEAST = 1 << 26  # bytes that they may take in any case

# Quantized, and less what the stored weights explain, only the rounding of the inputs to int8 is left. The worst column
# is measured at 1 to 14 times what rounding to nearest is expected to leave; a lost bias or branch at hundreds.
_KERNEL = 60.0
# Steps of the grid: rounding to nearest leaves 0.29 on average and 0.5 at worst. A zero point off by one is 1.04, a
# doubled scale or turned codes are several.
_WEIGHTS = 0.9
# Where codes were fitted to outputs they stand for the quantized base with the branch beside it, so its rounding and
# their own add up: twice the squared error of rounding to nearest. Measured 0.9 to 2.9; weights are 2 to 3 steps large,
# so wrong ones are off by 12 times their square, 50 and more. One wrong group of many is not seen so; for that the
# merge wrote down a digest of the values that it chose.
_FITTED = 8.0
# Of an adapter's effect, where its own matrices are rounded to int4: two roundings of 21 dB each, less at the worst
# column. What exporters lose of an adapter is more: DoRA's magnitudes half of its effect.
_ROUNDED = 0.1
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


def compare(
    linear: Mapping[str, nn.Module],
    on: OnnxTaps | TorchTaps,
    off: OnnxTaps | TorchTaps | None,
    tuned: TorchTaps,
    base: TorchTaps,
    samples: Sequence[Sample],
    *,
    decodes: bool,
    limits: tuple[float, float],
    merged: Callable[[str], AdaptedModule | Array | None],
    fitted: Fitted = False,
    digests: Mapping[str, str] | None = None,
    rounded: Collection[str] = (),
    judged: bool = True,
    lost: bool = False,
) -> Findings:
    """Compare an export with the tuned model module by module.

    Args:
        linear: torch's linear layers by module, as the base has them.
        on: the export with its adapter, watched.
        off: the same without it; None where that is not to be had, and survival is not measured.
        tuned: the reference, watched at the same modules.
        base: its base; may be `off` as well.
        samples: what was compared; of the longest of them up to TOKENS tokens are run.
        decodes: the export takes a KV cache.
        limits: decibels that the worst row of an input and the worst column of a float module's output must reach.
        merged: what a module's stored weight should hold beside the base's: blocks, or a dense matrix (out_features,
            in_features); None: nothing.
        fitted: codes were chosen for outputs, and so may be far from the weights.
        digests: of the stored values, where a merge wrote them down.
        rounded: modules whose adapter is quantized itself, as exporters do that know no better.
        judged: the exporter's rounding is known, so stored weights can be held against it.
        lost: the adapter's effect on the logits is not what it should be: look for it in the weights, too.

    Raises:
        ExportError: onnxruntime fails, or gives values of other sizes.
    """
    digests, sums = digests or {}, dict[str, _Sums]()
    watched = {name: linear[name] for name in tuned.modules}
    runs = _pieces(samples, _tokens(tuned.model, watched), decodes)
    hashed = {name for name, digest in digests.items() if digest}
    experts = {name: module for name, module in tuned.model.named_modules() if is_experts(module)}
    beside = _Beside(sums, linear, experts, on, merged, limits[1], fitted, hashed, rounded)
    with progress("Looking into modules", 5 * len(runs)) as advance:
        for pieces in runs:
            seen, wanted = list(on.see(pieces)), list(tuned.outputs(pieces))
            check(seen[0], wanted[0], {name: features(layer)[0] for name, layer in watched.items()})
            for name in [*wanted[0], *seen[0]]:  # in the network's order, then experts
                if name != EMBEDDINGS:
                    sums.setdefault(name, _Sums())
            advance(2)
            _add_effects(sums, seen, wanted, _without(off, base, pieces))
            del wanted
            advance(2)
            tuned.beside(pieces, seen, beside)
            advance(1)
    rows = [_row(name, one, limits, lost, judged, digests.get(name)) for name, one in sums.items()]
    first = next((row for row in rows if row["fault"]), None)
    if first is not None:
        log.warning("the first module that diverges: %s (%s)", first["name"], FAULTS[first["fault"]])
    return Findings(rows, first["name"] if first else None)


@dataclass(frozen=True)
class _Beside:
    """Called with every module's twin values; adds what they say to the sums."""

    sums: Mapping[str, _Sums]
    linear: Mapping[str, nn.Module]
    experts: Mapping[str, nn.Module]
    taps: OnnxTaps | TorchTaps
    merged: Callable[[str], AdaptedModule | Array | None]
    output_db: float
    fitted: Fitted
    hashed: Collection[str]  # modules whose stored values have a digest to be held against
    rounded: Collection[str]
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
            self._weigh(name, x, error, own_y)
        if sums.audit is None:
            columns = _squares(error, 0)
            sums.output_db = min(sums.output_db, _worst(np.full_like(columns, power.mean()), columns))

    def _weigh(self, name: str, x: Array, error: Array, own_y: Array) -> None:
        """Look at the stored weights, and at what of the output's error they do not explain."""
        if not isinstance(self.taps, OnnxTaps):
            return
        if (node := self.taps.graph.experts.get(name)) is not None:
            self.sums[name].audit = audit_experts(self.taps.graph, node, self.experts[name])
            return
        place = self.taps.places[name]
        more: dict[str, Any] = {"fitted": self.fitted, "hashed": name in self.hashed}
        looked = audit(self.taps.graph, place, self.linear[name], self.merged(name), x, **more)
        if looked is not None:
            self.sums[name].audit, expected = looked
            columns = _squares(error - expected.error, 0)
            rounding = float(_squares(own_y, 0).mean()) * 10 ** (-self.output_db / 10)  # of the float sums
            if name in self.rounded:
                alone = self.linear[name].forward(torch.from_numpy(x)[None])[0].numpy()
                rounding += float(_squares(own_y - alone, 0).mean()) * _ROUNDED
            self.sums[name].kernel = float((columns / (expected.noise + rounding / _KERNEL + 1e-30)).max())


def _tokens(model: nn.Module, watched: Mapping[str, nn.Module]) -> int:
    """How long a sequence may be: the inputs of one model and the outputs of four are held at once."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    per_token = sum(4 * (inputs + 4 * outputs) for inputs, outputs in map(features, watched.values()))
    return min(_LONGEST, max(_SHORTEST, int(max(_LEAST, _SHARE * weights)) // max(1, per_token)))


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


def _without(
    off: OnnxTaps | TorchTaps | None, base: TorchTaps, pieces: Sequence[Ids]
) -> Iterator[tuple[Outputs, Outputs]]:
    """What the export and torch give without the adapter, a piece each, made when it is asked for."""
    if off is base or off is None:
        yield from ((one if off is base else {}, one) for one in base.outputs(pieces))
    else:
        yield from zip(off.outputs(pieces), base.outputs(pieces), strict=True)


def _add_effects(
    sums: Mapping[str, _Sums],
    on: Sequence[Seen],
    tuned: Sequence[Outputs],
    without: Iterable[tuple[Outputs, Outputs]],
) -> None:
    """Add what both runs say of the adapter, piece by piece."""
    for exported_on, torch_on, (exported_off, torch_off) in zip(on, tuned, without, strict=True):
        for name, one in sums.items():
            if name not in torch_on:  # experts, whose output is taken over
                continue
            found, wanted = exported_on[name][1], torch_on[name]
            one.signal += float(_squares(wanted, 0).sum())
            one.inherited += float(_squares(found - wanted, 0).sum())
            if name not in exported_off:
                continue
            effect = (found - exported_off[name]).astype(np.float64)
            asked = (wanted - torch_off[name]).astype(np.float64)
            one.effect += float((effect**2).sum())
            one.wanted += float((asked**2).sum())
            one.product += float((effect * asked).sum())


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
