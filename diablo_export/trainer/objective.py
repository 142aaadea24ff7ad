"""What is learned: the loss and the evaluation of encoded items on a model, for each task."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_export.trainer.batches import collate
from diablo_export.trainer.data import IGNORED, Encoded
from diablo_export.trainer.nonfinite import first_nonfinite
from diablo_export.trainer.processes import Processes


@dataclass(frozen=True)
class Objective:
    """Next tokens, or classes, on one model."""

    model: nn.Module
    classify: bool
    pad: int  # the id that fills short items up
    device: torch.device
    autocast: bool  # matrix products in bfloat16
    processes: Processes = field(default_factory=Processes)

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        """The sum of the cross entropies over the batch's targets, in float32: of this process's items among them."""
        own, weight = self.processes.share(batch)
        logits, labels = self._predictions(own)
        return functional.cross_entropy(logits, labels, reduction="sum") * weight

    def targets(self, batch: Sequence[Encoded]) -> int:
        """How many classes or tokens of a batch are predicted; an item's first token never is."""
        return len(batch) if self.classify else sum(int(item.target[1:].sum()) for item in batch)

    def culprit(self, parts: Sequence[Sequence[Encoded]]) -> str:
        """Where a step's batches break the numbers: see `first_nonfinite`."""
        count = sum(self.targets(part) for part in parts)
        return first_nonfinite(self.model, (functools.partial(self._share, part, count) for part in parts))

    def _share(self, batch: Sequence[Encoded], count: int) -> Tensor:
        return self.loss(batch) / count

    @torch.no_grad()
    def evaluate(self, items: Sequence[Encoded], batch_size: int) -> dict[str, float]:
        """`eval_loss` per target, and a classifier's `eval_accuracy`, without dropout."""
        ordered = sorted(items, key=lambda item: len(item.ids))
        loss, right, count = 0.0, 0.0, 0.0
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(ordered), batch_size):
                own, weight = self.processes.share(ordered[start : start + batch_size])
                logits, labels = self._predictions(own)
                loss += functional.cross_entropy(logits, labels, reduction="sum").item() * weight
                right += int((logits.argmax(-1) == labels).sum()) * weight
                count += len(labels) * weight
        finally:
            self.model.train(training)
        loss, right, count = self.processes.sum([loss, right, count])
        return {"eval_loss": loss / count} | ({"eval_accuracy": right / count} if self.classify else {})

    def _predictions(self, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits (targets, classes or vocabulary) in float32, and the right answers (targets,)."""
        arrays = collate(batch, self.pad, self.classify)
        tensors = {name: torch.from_numpy(values).to(self.device) for name, values in arrays.items()}
        labels = tensors.pop("labels")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits: Tensor = self.model(**tensors).logits
        if self.classify:
            return logits.float(), labels
        asked = labels[:, 1:] != IGNORED  # (items, tokens − 1): position t predicts token t + 1
        return logits[:, :-1][asked].float(), labels[:, 1:][asked]
