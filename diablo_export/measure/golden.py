"""Golden rows: what an export gave when it was certified, small enough to travel with it, and how far a device is off.

Of each row of logits the likeliest tokens keep their exact log-probabilities; all others are one bucket. A KL over
buckets is at most the true one. Numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array
from diablo_export.errors import InputError

Ids = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
KEPT = 256  # tokens of a row: 99 % of the probability and more, in a kilobyte


@dataclass(frozen=True)
class Golden:
    """One input and what belongs to it.

    Attributes:
        adapter: name of the adapter that was active; None: the base.
        prompt: token ids (tokens,).
        tokens: (steps,) that were decoded after it through the KV cache; empty where the whole prompt is one answer.
        kept: token ids (rows, kept), the likeliest of each row.
        certified: log-probabilities (rows, kept + 1) that the export gave; the last is of all other tokens.
        tuned: the same of the tuned model in torch, or of its base.
    """

    adapter: str | None
    prompt: Ids
    tokens: Ids
    kept: Ids
    certified: Float64
    tuned: Float64

    @property
    def distance(self) -> float:
        """Mean KL(tuned ‖ certified), in nats."""
        return divergence(self.tuned, self.certified)

    def rows(self, logits: Array) -> Float64:
        """Logits (rows, vocabulary) as log-probabilities (rows, kept + 1).

        Raises:
            InputError: they are of another shape than those certified.
        """
        if logits.ndim != 2 or len(logits) != len(self.kept) or logits.shape[1] <= self.kept.max():
            raise InputError(f"logits of shape {logits.shape} where {len(self.kept)} rows were certified")
        return bucketed(logits, self.kept)


def record(adapter: str | None, prompt: Ids, tokens: Ids, tuned: Array, certified: Array) -> Golden:
    """Keep what matters of the logits (rows, vocabulary) of both models."""
    kept = np.argsort(-certified, axis=-1, kind="stable")[:, :KEPT].astype(np.int64)
    return Golden(adapter, prompt, tokens, kept, bucketed(certified, kept), bucketed(tuned, kept))


def bucketed(logits: Array, kept: Ids) -> Float64:
    """Logits (rows, vocabulary) → log-probabilities (rows, kept + 1) of the kept tokens, and of all others together."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(-1, keepdims=True)) + top
    chosen = np.take_along_axis(wide, kept, -1) - total
    # nothing is left over where every token is kept: a probability of 1e-300 counts as none
    others = np.log(np.maximum(1 - np.exp(chosen).sum(-1, keepdims=True), 1e-300))
    return np.concatenate([chosen, others], -1)


def divergence(reference: Float64, other: Float64) -> float:
    """Mean KL(reference ‖ other) in nats over rows of log-probabilities (rows, buckets); nan if one is not finite."""
    p = np.exp(reference)
    return float(np.maximum((p * (reference - other)).sum(-1), 0).mean())


def pack(cases: Sequence[Golden]) -> dict[str, Array]:
    """Arrays by name, for an .npz file."""
    packed: dict[str, Array] = {}
    for index, case in enumerate(cases):
        for name in ("prompt", "tokens", "kept", "certified", "tuned"):
            packed[f"{index}.{name}"] = getattr(case, name)
    return packed


def unpack(arrays: Mapping[str, Array], adapters: Sequence[str | None]) -> list[Golden]:
    """What `pack` packed; `adapters` names each case's.

    Raises:
        InputError: an array is not there.
    """

    def get(name: str) -> Any:
        if name not in arrays:
            raise InputError(f"the golden rows lack {name}; certify the folder again")
        return arrays[name]

    fields = ("prompt", "tokens", "kept", "certified", "tuned")
    return [Golden(adapter, *(get(f"{index}.{name}") for name in fields)) for index, adapter in enumerate(adapters)]
