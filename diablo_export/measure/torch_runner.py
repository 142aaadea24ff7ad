"""The reference: a Hugging Face model in torch, with its adapter on or off, one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diablo_export.blockdiag import Array
from diablo_export.measure.padding import pad
from diablo_export.measure.prompts import Ids
from diablo_export.trainer.layer import set_enabled
from diablo_export.trainer.model import positions


@dataclass(frozen=True)
class TorchRunner:
    """One state of a model: with its adapter (`adapted`), or without.

    Two runners can share a model; each sets the state that it needs before it runs. Off, a classifier's
    trained head stays: only blocks are switched. `switch` does it, for this program's layers or for another's.
    """

    model: nn.Module
    adapted: bool = True
    switch: Callable[[nn.Module, bool], None] = set_enabled

    def prefill(self, ids: Ids) -> Array:
        """Logits of a whole sequence (tokens,): (tokens, vocabulary), or (1, labels) of a classifier; float32."""
        return self._call(ids)[0]

    @torch.inference_mode()
    def batch(self, rows: Sequence[Ids], token: int, *, left: bool = False) -> list[Array]:
        """Logits of several sequences, padded with `token` and run at once; each as `prefill` gives it."""
        self.switch(self.model, self.adapted)
        padded = pad(rows, token, left=left)
        more = {"position_ids": torch.from_numpy(padded.positions)} if left else {}
        output = self.model(
            input_ids=torch.from_numpy(padded.ids), attention_mask=torch.from_numpy(padded.mask), **more
        )
        return padded.unpadded(output.logits.float().cpu().numpy())

    def decode(self, prompt: Ids, tokens: Ids) -> Array:
        """Logits that predict each of `tokens` after `prompt`, step by step with the KV cache: (steps, vocabulary)."""
        logits, cache = self._call(prompt, use_cache=True)
        rows = [logits[-1]]
        for token in tokens[:-1]:
            logits, cache = self._call(np.array([token]), past_key_values=cache, use_cache=True)
            rows.append(logits[-1])
        return np.stack(rows)

    def greedy(self, prompt: Ids, steps: int) -> tuple[Ids, Array]:
        """The `steps` likeliest next tokens, one after the other, and the logits (steps, vocabulary) they came from."""
        logits, cache = self._call(prompt, use_cache=True)
        rows = [logits[-1]]
        while len(rows) < steps:
            token = np.array([rows[-1].argmax()])
            logits, cache = self._call(token, past_key_values=cache, use_cache=True)
            rows.append(logits[-1])
        stacked = np.stack(rows)
        return stacked.argmax(-1).astype(np.int64), stacked

    @torch.inference_mode()
    def _call(self, ids: Ids, **more: Any) -> tuple[Array, Any]:
        self.switch(self.model, self.adapted)
        output = self.model(input_ids=torch.from_numpy(np.asarray(ids, np.int64))[None], **more)
        logits: Array = output.logits.float().cpu().numpy()
        # (1, tokens, vocabulary) → (tokens, vocabulary); a classifier's (1, labels) stays
        return logits.reshape(-1, logits.shape[-1]), getattr(output, "past_key_values", None)


def context_length(model: nn.Module) -> int:
    """How many positions a model takes; 512 where its config does not say."""
    found = positions(model)
    return 512 if math.isinf(found) else int(found)
