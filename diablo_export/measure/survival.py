"""How much of a fine-tune a merge into a grid keeps: the grid state of a network against its branch state.

Effect is grid − base, wanted is branch − base, on logits; base is the quantized model without the adapter, so what int4
does to the base is in neither of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from diablo_export.blockdiag import Array, BlockShape
from diablo_export.measure.metrics import Comparison, nll
from diablo_export.quantization import Float32
from diablo_export.requantize import Grid, touched
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import logits

MIN_SURVIVAL = 0.97  # gain within 1 ± 0.03, cosine of 0.97 at least


@dataclass(frozen=True)
class Survival:
    """What is left of an adapter.

    Attributes:
        gain: <effect, wanted> / <wanted, wanted>; nan where nothing was wanted.
        cosine: of effect and wanted.
        kl: mean KL(branch ‖ grid) over positions, in nats.
        base_kl: mean KL(branch ‖ base): what there was to keep.
        agreement: share of positions with the branch's first choice.
        task: where the text says what is right: `loss` of the next token, or `accuracy`, of the grid, and of branch
            and base as `branch_loss`, `base_loss` and so on.
    """

    gain: float
    cosine: float
    kl: float
    base_kl: float
    agreement: float
    task: Mapping[str, float] = field(default_factory=dict)

    def holds(self, least: float = MIN_SURVIVAL) -> bool:
        """Whether gain is within 1 ± (1 − least) and the cosine at least `least`; an adapter without effect holds."""
        if self.base_kl == 0 and self.kl == 0:
            return True
        return abs(self.gain - 1) <= 1 - least and self.cosine >= least

    def figures(self, least: float = MIN_SURVIVAL) -> dict[str, Any]:
        """As the manifest has it."""
        found = {"gain": self.gain, "cosine": self.cosine, "kl": self.kl, "base_kl": self.base_kl}
        return {**found, "top1_agreement": self.agreement, "holds": self.holds(least), **self.task}

    @property
    def distance(self) -> float:
        """How far from whole: what the best of several has least of."""
        return self.kl if math.isfinite(self.kl) else math.inf


class Judge:
    """Measures the grid state of one network on one text; what base and branch say to it is computed once."""

    def __init__(
        self, network: nn.Module, items: Sequence[Encoded], batch_size: int, pad: int = 0, *, truth: bool = False
    ) -> None:
        """Run base and branch on `items`; their logits are kept, so the text must be short for a large vocabulary.

        `truth`: their tokens, or their labels, are what the model should say.
        """
        self._truth = truth
        ordered = sorted(items, key=lambda item: len(item.ids))  # little padding
        self._network, self._pad = network, pad
        self._batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
        self._base, self._branch = self._logits("base"), self._logits("branch")

    def measure(self) -> Survival:
        """The survival of what the network's grids hold at the moment."""
        grid = self._logits("grid")
        found = of_logits(zip(self._base, self._branch, grid, strict=True))
        if not self._truth:
            return found
        said = {"": grid, "branch_": self._branch, "base_": self._base}
        scores = {f"{name}{key}": v for name, each in said.items() for key, v in task(self._batches, each).items()}
        return replace(found, task=scores)

    @torch.inference_mode()
    def _logits(self, state: str) -> list[Array]:
        return [np.asarray(logits(self._network, batch, self._pad, state).cpu()) for batch in self._batches]


def task(batches: Sequence[Sequence[Encoded]], found: Sequence[Array]) -> dict[str, float]:
    """`loss`, in nats a token, or a classifier's `accuracy`, of logits (positions, classes) of each batch.

    Empty where nothing is to be predicted: no label is known, no token counts.
    """
    right, lost = [], []
    for batch, one in zip(batches, found, strict=True):
        if len(one) == len(batch) and any(len(item.ids) > 1 for item in batch):  # one answer for each sequence
            labels = np.array([item.label for item in batch])
            right.append((one.argmax(-1) == labels)[labels >= 0])
            continue
        targets = np.concatenate([np.append(np.where(item.target, item.ids, -1)[1:], -1) for item in batch])
        counted = np.flatnonzero(targets >= 0)
        lost.append(nll(one[counted], targets[counted].astype(np.int64)))
    name, parts = ("accuracy", right) if right else ("loss", lost)
    values = np.concatenate([np.asarray(part, np.float64) for part in parts]) if parts else np.zeros(0)
    return {name: float(values.mean())} if len(values) else {}


def of_logits(batches: Iterable[tuple[Array, ...]]) -> Survival:
    """Survival from the logits (positions, classes) of base, branch and grid, batch after batch."""
    sums = Comparison()
    for base, branch, grid in batches:
        sums.update(branch, base, grid, base)
    gain, cosine = sums.survival()
    return Survival(gain, cosine, sums.divergence()["mean"], sums.wanted_kl, sums.agreement)


def of_outputs(
    shape: BlockShape, base: Grid, grid: Grid, wanted: Float32, moments: Sequence[Float32]
) -> tuple[float, float]:
    """Gain and cosine of one module's output, from the second moments of its inputs; nan where nothing was wanted.

    Args:
        shape: of its blocks.
        base: its grid without the adapter, (out, groups, size).
        grid: its grid with it.
        wanted: what the weight should be, (out, groups, size).
        moments: E[x xᵀ] of the groups that each block meets, in `requantize.touched`'s order.
    """
    ee = ew = ww = 0.0
    for (rows, groups), seen in zip(touched(shape, base.codes.shape[-1]), moments, strict=True):
        old = base.part(rows, groups).values()
        effect = (grid.part(rows, groups).values() - old).reshape(len(old), -1)
        asked = (wanted[rows, groups] - old).reshape(len(old), -1)
        moved = effect @ seen
        ee, ew = ee + float((moved * effect).sum()), ew + float((moved * asked).sum())
        ww += float(((asked @ seen) * asked).sum())
    return ew / ww if ww else math.nan, ew / math.sqrt(ee * ww) if ee * ww > 0 else math.nan
