"""Encoded examples into batches: packing of running text, batches of similar length, the order of every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.errors import DataError
from diablo_export.trainer.data import IGNORED, Encoded, Example, encode

_WINDOW = 50  # steps that are sorted by length together: long enough for little padding, short enough to stay random


def pack(documents: Iterable[Encoded], length: int) -> list[Encoded]:
    """All documents one after the other, cut into pieces of `length` tokens; the last one may be shorter.

    Nothing is lost and nothing padded. A piece's first token is not predicted, its others are, also across
    a document's end.
    """
    ids = np.concatenate([document.ids for document in documents])
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    if len(pieces) > 1 and len(pieces[-1]) < 2:
        pieces.pop()  # a single token predicts nothing
    return [Encoded(piece, np.ones(len(piece), np.bool_)) for piece in pieces]


@dataclass(frozen=True)
class Batches:
    """The batches of every step, as a function of the step alone: a resumed run sees what it would have seen.

    Each epoch goes through all items in a new order; steps hold items of similar length. How many batches a step is cut
    into changes nothing of what it holds.
    """

    items: Sequence[Encoded]
    batch_size: int
    accumulation: int = 1  # batches in a step; one step of an epoch may have fewer
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every item comes once."""
        return -(-len(self.items) // (self.batch_size * self.accumulation))

    @cached_property
    def _orders(self) -> dict[int, list[npt.NDArray[np.int64]]]:
        return {}

    def __call__(self, step: int) -> list[list[Encoded]]:
        """The batches of one step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._order(epoch)
        items = [self.items[index] for index in self._orders[epoch][within]]
        return [items[at : at + self.batch_size] for at in range(0, len(items), self.batch_size)]

    def _order(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.items))
        lengths = np.array([len(item.ids) for item in self.items])
        size = self.batch_size * self.accumulation
        window = size * _WINDOW
        steps: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(shuffled), window):
            part = shuffled[start : start + window]
            part = part[np.argsort(lengths[part], kind="stable")]
            steps += [part[at : at + size] for at in range(0, len(part), size)]
        return [steps[index] for index in random.permutation(len(steps))]


def collate(batch: Sequence[Encoded], pad: int, classify: bool) -> dict[str, npt.NDArray[np.int64]]:
    """One batch as arrays, padded at the right.

    Returns:
        input_ids and attention_mask (items, tokens); labels (items,) of classes, or (items, tokens) with the token
        to be predicted at its own position, IGNORED elsewhere.
    """
    shape = (len(batch), max(len(item.ids) for item in batch))
    ids, mask, labels = np.full(shape, pad, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, item in enumerate(batch):
        size = len(item.ids)
        ids[row, :size], mask[row, :size] = item.ids, 1
        labels[row, :size] = np.where(item.target, item.ids, IGNORED)
    if classify:
        labels = np.array([item.label for item in batch], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def digest(items: Iterable[Encoded]) -> str:
    """Tells one set of items from another, in hex: what a tokenizer and its chat template made of the data, too."""
    found = hashlib.sha256()
    for item in items:
        found.update(np.array([len(item.ids), item.label], np.int64).tobytes())
        found.update(item.ids.tobytes() + item.target.tobytes())
    return found.hexdigest()


def encode_all(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    classes: Sequence[str | int] | None = None,
    advance: Callable[[float], None] = lambda amount: None,
) -> tuple[list[Encoded], list[int]]:
    """Examples ready for `Batches`: packed text, or one item each; and the lines that had nothing to learn from.

    A prompt that fills `max_length` leaves nothing of its completion: such lines are left out and returned.

    Raises:
        DataError: a label that is not among `classes`, or nothing left at all.
    """
    index = {name: position for position, name in enumerate(classes or ())}
    for example in examples:
        if classes is not None and example.label not in index:
            raise DataError(
                f"line {example.line} has the label {example.label!r}; "
                f"the training data has {', '.join(map(repr, index))}"
            )
    packing = classes is None and examples[0].form == "text"
    encoded = []
    for example in examples:
        limit = None if packing else max_length
        encoded.append(
            encode(example, tokenizer, limit, index[example.label] if classes and example.label is not None else None)
        )
        advance(1)
    if packing:
        pieces = pack(encoded, max_length)
        if len(pieces[0].ids) < 2:
            raise DataError("the whole text is a single token, which predicts nothing; give more text")
        return pieces, []
    if classes is not None:
        return encoded, []
    kept = [item for item in encoded if item.target[1:].any()]
    if not kept:
        raise DataError(f"no line has a completion or assistant turn within {max_length} tokens; raise --max-length")
    return kept, [item.line for item in encoded if not item.target[1:].any()]


def hold_out(
    items: Sequence[Encoded], fraction: float, seed: int, running: bool
) -> tuple[list[Encoded], list[Encoded]]:
    """Items to train on, and held-out ones: the end of running text, else items at random.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = max(1, round(len(items) * fraction)) if fraction else 0
    if count >= len(items):
        raise DataError(f"--eval-fraction {fraction} of {len(items)} items leaves nothing to train on; give more data")
    # pieces of one text cannot be drawn at random: the neighbours of a held-out piece would be trained on
    order = np.arange(len(items)) if running else np.random.default_rng(seed).permutation(len(items))
    kept, held = order[: len(items) - count], order[len(items) - count :]
    return [items[index] for index in sorted(kept)], [items[index] for index in sorted(held)]
