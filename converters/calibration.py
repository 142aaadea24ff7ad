"""The text that a merge is measured, calibrated and distilled on: given, or written by the tuned model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from diablo_export.errors import DataError
from diablo_export.trainer.batches import encode_all
from diablo_export.trainer.data import Encoded, encode, read_examples
from diablo_export.trainer.grid import grid_layers
from diablo_export.trainer.sampling import random_sentences, sample_text, telling_text

_SENTENCE = (6, 48)  # ordinary tokens in a random sentence


@dataclass(frozen=True)
class Text:
    """Token sequences, and how they came about.

    Attributes:
        judged: what survival is measured on; nothing is fitted to it.
        fitted: what codes are fitted to.
        origin: a few words for the manifest.
        true: its tokens, or its labels, are what a model should say.
    """

    judged: list[Encoded]
    fitted: list[Encoded]
    origin: str
    true: bool = False


def given_text(
    data: str | Path,
    tokenizer: Any,
    *,
    length: int,
    classifier: bool,
    judged: int,
    fitted: int,
    labels: Sequence[str | int] = (),
) -> Text:
    """The first sequences of a data file, every so manyth of them to measure on; labels are looked at to count hits.

    Args:
        data: a file that `train` takes too.
        tokenizer: the model's.
        length: tokens in a sequence, at most.
        classifier: tokenize as a classifier reads.
        judged: sequences to measure on, at most.
        fitted: sequences to fit to, at most.
        labels: class names of a classifier, in class order.

    Raises:
        DataError: unreadable, empty, or a single sequence.
    """
    examples = read_examples(data)
    if classifier:
        # any label at all: an unlabelled text would be ended as a language model's is
        known = {str(label): index for index, label in enumerate(labels)}
        items = [
            encode(replace(each, label=each.label or 0), tokenizer, length, known.get(str(each.label)))
            for each in examples
        ]
    else:
        items, _ = encode_all(examples, tokenizer, max_length=length)
    if len(items) < 2:
        raise DataError(
            f"{data}: is one sequence of {length} tokens at most; calibration needs two at least, one to fit codes to "
            "and one to measure on. Give more text"
        )
    every = max(2, min(-(-(judged + fitted) // judged), len(items) // min(judged, len(items) // 2)))
    held = items[::every][:judged]
    rest = [item for index, item in enumerate(items) if index % every][:fitted]
    return Text(held, rest, f"{len(held)} + {len(rest)} sequences of {data}", true=True)


def written_text(
    network: nn.Module,
    tokenizer: Any,
    *,
    length: int,
    classifier: bool,
    judged: int,
    fitted: int,
    seed: int = 0,
    writer: str = "the tuned model",
) -> Text:
    """Text without data: what the model writes, such as int4 base + branch, or sentences of random tokens.

    Args:
        network: base and branch in `GridLinear` layers, or the tuned model alone.
        tokenizer: its tokenizer.
        length: tokens in a sequence.
        classifier: it cannot write; it gets random tokens.
        judged: sequences to measure on.
        fitted: sequences to fit to.
        seed: of every draw.
        writer: what the network is called.
    """
    if classifier:
        return random_text(tokenizer, length=length, judged=judged, fitted=fitted, seed=seed)
    # where base and branch lie in one network, it can tell what the one says and the other does not
    write = telling_text if grid_layers(network) else sample_text
    items = write(network, tokenizer, judged + fitted, length, seed=seed)
    origin = f"{len(items)} sequences of {length} tokens, sampled from {writer}"
    return Text(list(items[:judged]), list(items[judged:]), origin)


def text_for(
    calibration: str | Path | None,
    network: nn.Module,
    tokenizer: Any,
    *,
    labels: Sequence[str | int] = (),
    seed: int = 0,
    writer: str = "the tuned model",
    **how: Any,
) -> Text:
    """`given_text` of a data file; `written_text` where there is none."""
    if calibration is not None:
        return given_text(calibration, tokenizer, labels=labels, **how)
    return written_text(network, tokenizer, seed=seed, writer=writer, **how)


def random_text(tokenizer: Any, *, length: int, judged: int, fitted: int, seed: int = 0, whole: bool = False) -> Text:
    """Sequences of random tokens, for a model that cannot write.

    Args:
        tokenizer: the model's.
        length: tokens in a sequence, at most.
        judged: sequences to measure on.
        fitted: sequences to fit to.
        seed: of every draw.
        whole: of full length, and not as long as sentences are.
    """
    most = length - 4  # room for the special tokens around it
    lengths = (most, most) if whole else (min(_SENTENCE[0], most), min(_SENTENCE[1], most))
    items = random_sentences(tokenizer, judged + fitted, lengths, seed=seed)
    kind = "sequences" if whole else "sentences"
    return Text(items[:judged], items[judged:], f"{len(items)} {kind} of random tokens")
