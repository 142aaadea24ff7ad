"""The methods of merging into an int4 model, tried one after the other on one network and one text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diablo_export.adapter import Adapter, base_weight
from diablo_export.blockdiag import add_to_weight
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log, progress
from diablo_export.converters import budget
from diablo_export.converters.calibration import Text, text_for, written_text
from diablo_export.converters.grid_network import GridNetwork, target
from diablo_export.converters.grid_report import against_runtime, changed_codes, reported
from diablo_export.converters.grid_write import write_grid
from diablo_export.converters.onnx_groups import scale_type
from diablo_export.converters.onnx_match import Match
from diablo_export.measure.survival import Judge, Survival, of_outputs
from diablo_export.measure.torch_runner import context_length
from diablo_export.quantization import Float32
from diablo_export.requantize import (
    Grid,
    calibrated,
    grouped,
    nearest,
    refitted,
    rounded,
    touched,
    ungrouped,
    whole_steps,
    with_touched,
)
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import distil, logits
from diablo_export.trainer.grid import grid_layers
from diablo_export.trainer.model import vocabulary_size
from diablo_export.trainer.moments import input_moments
from diablo_export.trainer.sampling import WRITING

METHODS = ("auto", "rtn", "refit", "calibrated", "distilled")
_LENGTH = 128  # tokens of a sequence
_JUDGED, _MOMENTS, _FITTED = 16, 64, 512  # sequences: to measure on, to calibrate on, to distil on (those among them)
_WRITTEN = 384  # sequences to distil on where the model must write them
_LOGITS = 1 << 26  # that are kept of the judged text
_SWEEP_SPEED = 5e8  # multiply-adds of a sweep in a second, in numpy on one core
_QUICK = 0.1  # of the seconds: what `auto` spends on a better method though another holds
_ENOUGH = 0.25  # of rounding's KL: a merge that holds and loses no more is good enough
_SETTLED, _SETTLED_LR = 0.4, 0.02  # of the steps, where codes hold already; of code units, where they move a little
_TEXT_SHARE = 0.4  # of the seconds: for text, moments and measuring; the rest is for distilling

Grids = dict[str, Grid]


@dataclass(frozen=True)
class Tried:
    """One method's grids, and what they keep."""

    method: str
    grids: Grids
    survival: Survival
    seconds: float
    steps: int = 0

    def write(self, one: Match, made: GridNetwork, folder: Path) -> dict[str, Any]:
        """Write one module into the file, and its manifest entry."""
        name = one.module.name
        return write_grid(one, self.method, self.grids.get(name), made.grids.get(name), folder)


def best_of(tried: Sequence[Tried], least: float) -> Tried:
    """The one that loses least of those that hold the survival asked for, or of all where none does."""
    held = [one for one in tried if one.survival.holds(least)]
    return min(held or tried, key=lambda one: one.survival.distance)


def _held(tried: Sequence[Tried], least: float) -> bool:
    return any(one.survival.holds(least) for one in tried)


class Bench:
    """A network, its text, and one method after the other."""

    def __init__(
        self,
        made: GridNetwork,
        adapter: Adapter,
        folder: Path,
        reference: str | Path,
        calibration: str | Path | None,
        max_seconds: float,
        seed: int,
        float_base: Checkpoint | None,
    ) -> None:
        self.made, self.adapter, self._seed, self._float_base = made, adapter, seed, float_base
        self._seconds, self._reference = max_seconds, reference
        self.pad = int(made.tokenizer.pad_token_id or 0)
        self._classifier = adapter.classifies
        self._calibration = calibration
        self._length = min(_LENGTH, context_length(made.network))
        self._most = budget.batch_tokens(made.network)
        self._per_token = self._measured_speed()
        self.text = self._first_text()
        self._alike = self._against_runtime(folder)
        self.batch = max(1, self._most // self._longest([*self.text.judged, *self.text.fitted]))
        self.judge = Judge(made.network, self.text.judged, self.batch, self.pad, truth=self.text.true)
        self.wanted = {name: target(adapter.modules[name], made.grids[name]) for name in made.grids}
        self.layers = grid_layers(made.network)
        self.moments = self._moments()

    def tries(self, method: str, least: float) -> Iterator[Tried]:
        """The method asked for; for `auto` all that take seconds, and distillation where none of them holds."""
        makers = {"rtn": self._rtn, "refit": self._refit, "calibrated": self._calibrated}
        if method == "auto" and self._moves_codes():
            makers = {"on_grid": self._on_grid}
        wanted = list(makers) if method == "auto" else [method] if method in makers else ["calibrated"]
        tried: list[Tried] = []
        for name in wanted:
            if name == "calibrated" and _held(tried, least) and self._sweeping() > _QUICK * self._seconds:
                return  # a large model with few blocks: what holds already is the cheapest
            tried.append(self._made(name, makers[name]))
            if method != "distilled":
                yield tried[-1]
        if method == "distilled":
            yield from self._distilled(tried, least, must=True)
        elif method == "auto" and self._classifier and self._calibration is None and not _held(tried, least):
            # measured: what is calibrated on random tokens holds for sentences, what is distilled on them less
            log.warning("not distilled: a classifier needs sentences for that; give some as --calibration, unlabelled")
        elif method == "auto" and not (_held(tried, least) and self._enough(tried)):
            yield from self._distilled(tried, least, must=False)

    def _made(self, name: str, maker: Callable[[str, Grid], Grid]) -> Tried:
        start = time.perf_counter()
        grids = {module: maker(module, grid) for module, grid in self.made.grids.items()}
        for module, grid in grids.items():
            self.layers[module].begin(grid)
        return Tried(name, grids, self.judge.measure(), time.perf_counter() - start)

    def _enough(self, tried: Sequence[Tried]) -> bool:
        """Whether distilling on top of what holds already is left out: there is little to gain, or it takes long."""
        least = min(one.survival.distance for one in tried)
        enough = tried[0].method != "rtn" or least <= _ENOUGH * tried[0].survival.distance
        if enough or (self._classifier and self._calibration is None):
            return True
        steps = self._affordable()
        return steps is None or steps.seconds * _SETTLED > _QUICK * self._seconds

    def _affordable(self) -> budget.Steps | None:
        return budget.affordable(self._per_token, self._seconds * (1 - _TEXT_SHARE), self._most)

    def report(self, tried: list[Tried], best: Tried, asked: str, least: float) -> dict[str, Any]:
        """The manifest's `survival`."""
        rows = [self._row(one, least) for one in tried]
        return reported(rows, asked, best.method, best.survival.holds(least), least, self.text, self._alike)

    def _row(self, one: Tried, least: float) -> dict[str, Any]:
        changed, total = changed_codes(one.grids, self.made.grids)
        return {
            "method": one.method,
            **one.survival.figures(least),
            "codes_changed": changed / max(1, total),
            "seconds": round(one.seconds, 2),
            **({"steps": one.steps} if one.steps else {}),
            "modules": {name: self._of_module(name, grid) for name, grid in one.grids.items()},
        }

    def _of_module(self, name: str, grid: Grid) -> dict[str, float]:
        """Gain and cosine of the module's output on the text's inputs, and the share of its codes that changed."""
        gain, cosine = of_outputs(
            self.layers[name].shape, self.made.grids[name], grid, self.wanted[name], self.moments[name]
        )
        changed, _ = changed_codes({name: grid}, self.made.grids)
        return {"gain": gain, "cosine": cosine, "codes_changed": changed / max(1, grid.codes.size)}

    # ------------------------------------------------------------------------------------------------ the methods

    def _moves_codes(self) -> bool:
        """Whether the adapter was trained on a grid, and it is this one; says so where it is another."""
        if self.adapter.base_grid is None or not self.adapter.base_grid.on_grid:
            return False
        strange = [name for name, grid in self.made.grids.items() if not whole_steps(self.wanted[name], grid)]
        if strange:
            log.warning(
                "the adapter was trained to move the codes of another grid than that of %s%s: merged as any other is",
                strange[0], f" and {len(strange) - 1} more modules" if strange[1:] else "",
            )  # fmt: skip
        return not strange

    def _on_grid(self, name: str, grid: Grid) -> Grid:
        return with_touched(grid, self.wanted[name], self.layers[name].shape, lambda t, g, _: nearest(t, g))

    def _rtn(self, name: str, grid: Grid) -> Grid:
        wanted = self.wanted[name]
        if self._float_base is not None:
            module = self.adapter.modules[name]
            weight = add_to_weight(base_weight(self._float_base, name), module.blocks)
            wanted = grouped(np.asarray(weight, np.float32), grid.codes.shape[-1])
        merged = with_touched(grid, wanted, self.layers[name].shape, lambda t, g, _: rounded(t, g))
        return merged.stored_as(scale_type(self.made.found[name]))

    def _refit(self, name: str, grid: Grid) -> Grid:
        dtype = scale_type(self.made.found[name])
        return with_touched(grid, self.wanted[name], self.layers[name].shape, lambda t, g, _: refitted(t, g, dtype))

    def _calibrated(self, name: str, grid: Grid) -> Grid:
        dtype, moments = scale_type(self.made.found[name]), self.moments[name]

        def choose(target: Float32, old: Grid, number: int) -> Grid:
            return calibrated(target, [old, refitted(target, old, dtype)], moments[number], dtype)

        return with_touched(grid, self.wanted[name], self.layers[name].shape, choose)

    def _sweeping(self) -> float:
        """About how many seconds calibrating takes: two starts, five sweeps of rows · columns² each."""
        operations = 0
        for name, grid in self.made.grids.items():
            size = grid.codes.shape[-1]
            for rows, groups in touched(self.layers[name].shape, size):
                operations += (rows.stop - rows.start) * ((groups.stop - groups.start) * size) ** 2
        return 10 * operations / _SWEEP_SPEED

    def _distilled(self, tried: Sequence[Tried], least: float, must: bool) -> Iterator[Tried]:
        """Codes trained from the float branch on; or from the best codes on, a little, where those are good already.

        A classifier's answer to a text is a number or two: enough to mend codes by, not to find them.
        """
        start = time.perf_counter()
        holds = _held(tried, least)
        settled = self._classifier or holds
        grids = (best_of(tried, least) if settled else tried[-1]).grids
        steps = self._affordable()
        if steps is None:
            short = budget.shortest(self._per_token, self._most)
            said = f"{short.steps} steps of {short.batch_tokens} tokens would take about {short.seconds:,.0f} s here"
            if not must:
                log.warning("not distilled: %s; --max-seconds %.0f allows less", said, self._seconds)
                return
            steps = short
        share = _SETTLED if holds else 1.0
        count, seconds = int(share * steps.steps), share * steps.seconds
        log.info("distilling: %d steps of %d tokens, about %.0f s", count, steps.batch_tokens, seconds)
        items = [*self.text.fitted, *self._more_text()]
        for name, grid in grids.items():
            wanted = ungrouped(self.wanted[name], self.layers[name].shape.in_features)
            self.layers[name].begin(grid, None if holds else wanted, near=self._classifier)
        how = {"lr": _SETTLED_LR, "hard": 0.0} if settled else {}
        with progress("Distilling", count) as advance:
            size = max(1, steps.batch_tokens // self._longest(items))
            distil(
                self.made.network, items, steps=count, batch_size=size, pad=self.pad, seed=self._seed,
                advance=advance, **how,
            )  # fmt: skip
        finished = {name: self.layers[name].finish() for name in grids}
        yield Tried("distilled", finished, self.judge.measure(), time.perf_counter() - start, count)

    # --------------------------------------------------------------------------------------------------- the text

    def _against_runtime(self, folder: Path) -> float:
        """Cosine of the base's logits in the network and in onnxruntime, on one sequence."""
        item = max(self.text.judged, key=lambda each: len(each.ids))
        with torch.inference_mode():
            ours = logits(self.made.network, [item], self.pad, "base").cpu().numpy()
        return against_runtime(ours, item, folder, self._reference)

    def _measured_speed(self) -> float:
        ids = np.random.default_rng(self._seed).integers(0, len(self.made.tokenizer), self._length).astype(np.int32)
        vocabulary = vocabulary_size(self.made.network, int(ids.max()) + 1)
        item = Encoded(ids % vocabulary, np.ones(len(ids), np.bool_))
        return budget.seconds_per_token(self.made.network, [item], self.pad)

    def _first_text(self) -> Text:
        sequences = self._sequences()
        moments = int(min(_MOMENTS, max(4, sequences - _JUDGED)))
        vocabulary = vocabulary_size(self.made.network)
        judged = int(max(2, min(_JUDGED, sequences / 4, _LOGITS / (vocabulary * self._length))))
        many = 16 if self._classifier else 1  # its sequences are short, and give one answer each
        how: dict[str, Any] = {"length": self._length, "classifier": self._classifier, "judged": judged * many}
        how |= {"labels": self.adapter.labels, "seed": self._seed, "fitted": moments * many}
        if self._calibration is not None:
            how["fitted"] = 4 * (_FITTED if sequences > _FITTED else moments) * many
        return text_for(self._calibration, self.made.network, self.made.tokenizer, **how)

    def _more_text(self) -> list[Encoded]:
        """What distillation wants beyond the first text."""
        if self._calibration is not None:
            return []
        wanted = _FITTED * 16 if self._classifier else min(_WRITTEN, self._sequences())
        short = int(wanted) - len(self.text.fitted)
        if short <= 0:
            return []
        return written_text(
            self.made.network, self.made.tokenizer, length=self._length, classifier=self._classifier, judged=0,
            fitted=short, seed=self._seed + 1,
        ).fitted  # fmt: skip

    def _sequences(self) -> float:
        """How many sequences there is time for: to write, and for base, branch, moments and each method to read."""
        reads = 3 + (WRITING if self._calibration is None and not self._classifier else 0)
        return self._seconds * _TEXT_SHARE / (self._per_token * self._length * reads)

    def _moments(self) -> dict[str, list[Float32]]:
        sizes = {name: grid.codes.shape[-1] for name, grid in self.made.grids.items()}
        items = sorted(self.text.fitted[: _MOMENTS * (16 if self._classifier else 1)], key=lambda item: len(item.ids))
        return input_moments(self.made.network, items, sizes, batch_size=self.batch, pad=self.pad)

    def _longest(self, items: list[Encoded]) -> int:
        return max(len(item.ids) for item in items)
