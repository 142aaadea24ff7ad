"""Held-out data that the other scripts judge on: the files, what a network says to them, and how good that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_quality import write

from diablo_export.blockdiag import Array
from diablo_export.measure.metrics import Comparison
from diablo_export.trainer.batches import pack
from diablo_export.trainer.data import IGNORED, Encoded, class_names, encode, read_examples
from diablo_export.trainer.distillation import logits

_LENGTH = 128  # tokens of a sequence
_AT_ONCE = 16  # sequences


def shakespeare(data: Path, work: Path, characters: int) -> tuple[Path, Path]:
    """Write nine tenths of tiny Shakespeare to train on, and so many characters of the last to judge on."""
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    write(work / "text.jsonl", [{"text": text[:cut]}])
    write(work / "text-held-out.jsonl", [{"text": text[cut : cut + characters]}])
    return work / "text.jsonl", work / "text-held-out.jsonl"


def sst2(data: Path, work: Path, words: int = 100) -> tuple[Path, Path]:
    """Write SST-2's training sentences, and those of dev and test to judge on; none of more than so many words."""
    labels = ("negative", "positive")
    for name, parts in (("train", ["train"]), ("held-out", ["dev", "test"])):
        lines = [line for part in parts for line in (data / "sst2" / f"{part}.tsv").read_text("utf-8").splitlines()]
        rows = [row for line in lines if len((row := line.rsplit("\t", 1))[0].split()) <= words]
        write(work / f"sentences-{name}.jsonl", [{"text": text, "label": labels[int(one)]} for text, one in rows])
    return work / "sentences-train.jsonl", work / "sentences-held-out.jsonl"


class HeldOut:
    """Sequences that networks are judged on."""

    def __init__(self, file: Path, tokenizer: Any, classifier: bool, tokens: int | None = None) -> None:
        """Read a file of sentences, or so many tokens of running text."""
        self.classifier = classifier
        self._pad = int(tokenizer.pad_token_id or 0)
        examples = read_examples(file)
        if classifier:
            order = class_names(examples, file)
            items = [encode(each, tokenizer, _LENGTH, order.index(each.label or 0)) for each in examples]
            self.items = sorted(items, key=lambda item: len(item.ids))
        else:
            self.items = pack([encode(each, tokenizer) for each in examples], _LENGTH)[: tokens and tokens // _LENGTH]

    @torch.inference_mode()
    def logits(self, network: torch.nn.Module, state: str = "branch") -> list[Array]:
        """What a network says, (positions or sentences, classes) for each batch."""
        return [np.asarray(logits(network, batch, self._pad, state)) for batch in self._batches()]

    def figure(self, found: Sequence[Array]) -> float:
        """Accuracy of a classifier, else loss per token."""
        pairs = list(zip(found, self._batches(), strict=True))
        if self.classifier:
            return float(
                np.concatenate([one.argmax(-1) == [each.label for each in batch] for one, batch in pairs]).mean()
            )
        losses = []
        for one, batch in pairs:
            targets = _next_tokens(batch)
            loss = torch.nn.functional.cross_entropy(torch.from_numpy(one), torch.from_numpy(targets), reduction="none")
            losses.append(loss.numpy()[targets != IGNORED])
        return float(np.concatenate(losses).mean())

    def _batches(self) -> Iterator[list[Encoded]]:
        for start in range(0, len(self.items), _AT_ONCE):
            yield self.items[start : start + _AT_ONCE]


def compared(wanted: Sequence[Array], base: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
    """Gain and cosine of found − base against wanted − base, and the mean KL from wanted to found, in nats."""
    sums = Comparison()
    for one, two, three in zip(wanted, base, found, strict=True):
        sums.update(one, two, three, two)
    gain, cosine = sums.survival()
    return {"gain": gain, "cosine": cosine, "kl": sums.divergence()["mean"]}


def _next_tokens(batch: Sequence[Encoded]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What each position of packed sequences predicts; a sequence's last token predicts nothing."""
    ids = np.concatenate([item.ids for item in batch])
    first = np.cumsum([0, *(len(item.ids) for item in batch)])[:-1]
    targets = np.roll(ids, -1).astype(np.int64)
    targets[np.append(first[1:], len(ids)) - 1] = IGNORED
    return targets
