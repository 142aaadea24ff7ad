"""What is compared: built-in prompts, or a data file, as sequences of token ids within the asked bounds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.errors import DataError
from diablo_export.trainer.data import Example, encode, read_examples

Ids = npt.NDArray[np.int64]

# short and long, prose, verse, speech, numbers, code, lists and another language: enough to meet every weight
PROMPTS = (
    "Once upon a time there was a little girl who lived near the forest.",
    "The",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: What is 17 times 24?\nA:",
    "The committee met on 3 March 1974 and decided, by nine votes to two, that the bridge should be rebuilt in stone.",
    "Dear Anna,\n\nThank you for your letter. We arrived safely, although the train was late and",
    "It was the worst film that I have seen in years: slow, loud and far too long.",
    "What a lovely, warm and funny story! I would watch it again tomorrow.",
    "Ingredients: 200 g flour, 2 eggs, 100 g sugar, a pinch of salt. First,",
    "KING. Speak, and be brief. What news is there from the north?\nMESSENGER.",
    "Der Zug nach Berlin fährt heute um zehn Uhr ab.",
    "one two three four five six seven eight nine ten eleven",
    "The cell membrane consists of a double layer of lipids, in which proteins are embedded; it lets water pass, but",
    "\"Where are you going?\" asked the boy. \"Home,\" said the dog, \"before the rain comes.\" They walked together"
    " until the road turned, and there, under the old oak tree, sat a cat with a red ribbon and a letter in its mouth.",
    "SELECT name, price FROM items WHERE price <",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One sequence to compare."""

    ids: Ids  # (tokens,)
    target: npt.NDArray[np.bool_]  # (tokens,): whether perplexity counts this token
    label: str | int | None = None  # of the example that it was made from


def collect(
    tokenizer: Any,
    data: str | Path | None,
    *,
    window: int,
    classifier: bool = False,
    samples: int | None = None,
    max_tokens: int = 8192,
    seed: int = 0,
) -> list[Sample]:
    """Token sequences of at most `window` tokens from a data file, or from the built-in prompts.

    Args:
        tokenizer: the model's.
        data: a file that `train` takes too; None: the built-in prompts.
        window: the longest sequence. A longer text continues in the next one; a classifier's is cut.
        classifier: texts are tokenized as a classifier reads them.
        samples: at most this many examples, drawn with `seed` where there are more; None: all.
        max_tokens: at most this many tokens in all; what is over is left out.
        seed: of the draw.

    Raises:
        DataError: unreadable data, a bad line (named by number), or nothing to compare.
    """
    examples = [Example(text=prompt) for prompt in PROMPTS] if data is None else read_examples(data)
    if samples is not None and len(examples) > samples:
        chosen = sorted(random.Random(seed).sample(range(len(examples)), samples))
        examples = [examples[index] for index in chosen]
    found: list[Sample] = []
    left = max_tokens
    for piece in (piece for example in examples for piece in _pieces(example, tokenizer, window, classifier)):
        if classifier and len(piece.ids) > left:  # it reads a whole text or none of it
            continue
        kept = Sample(piece.ids[:left], piece.target[:left], piece.label)
        if len(kept.ids):
            found.append(kept)
            left -= len(kept.ids)
    if not found:
        raise DataError(
            f"{data or 'built-in prompts'}: nothing to compare: {len(examples)} examples within --samples {samples} "
            f"and --max-tokens {max_tokens} give no tokens; give more data, or larger bounds"
        )
    return found


def digest(samples: Iterable[Sample]) -> str:
    """XXH3-128 of sequences, of what counts in them and of their labels: whether two runs read the same."""
    import xxhash  # here, as `verify` does without it

    found = xxhash.xxh3_128()
    for sample in samples:
        said = [sample.ids.tolist(), np.flatnonzero(sample.target).tolist(), sample.label]
        found.update(json.dumps(said).encode())
    return found.hexdigest()


def _pieces(example: Example, tokenizer: Any, window: int, classifier: bool) -> Iterator[Sample]:
    if classifier:
        # any label at all: an unlabelled text would be ended as a language model's is
        labelled = replace(example, label=0) if example.label is None else example
        encoded = encode(labelled, tokenizer, max_length=window)
        yield Sample(encoded.ids.astype(np.int64), encoded.target, example.label)
        return
    encoded = encode(example, tokenizer)
    for start in range(0, len(encoded.ids), window):
        piece = slice(start, start + window)
        # a piece's first token has nothing before it in its window: `targets` leaves it out
        yield Sample(encoded.ids[piece].astype(np.int64), encoded.target[piece], example.label)
