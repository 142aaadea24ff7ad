"""What a device can afford in a number of seconds, from one measured run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diablo_export.console import log
from diablo_export.converters.sizes import COPIES
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import logits
from diablo_export.trainer.model import vocabulary_size

STEPS, BATCH_TOKENS = 150, 1024  # of a distillation where nothing is scarce
_LEAST_STEPS, _LEAST_TOKENS = 40, 512  # less than that does not pay
_PASSES = 5  # of a step: base, branch and grid forward, and a backward pass that is worth two
_LOGITS = 1 << 26  # of one batch: 256 MB in float32


@dataclass(frozen=True)
class Steps:
    """How long to distil.

    Attributes:
        steps: of Adam.
        batch_tokens: in each.
        seconds: estimated.
    """

    steps: int
    batch_tokens: int
    seconds: float


def place(network: nn.Module, copies: float = COPIES) -> str:
    """Where a network is trained: on the GPU, where that has room for so many copies of its weights."""
    if not torch.cuda.is_available():
        return "cpu"
    needs = copies * sum(values.nbytes for values in (*network.parameters(), *network.buffers()))
    free = torch.cuda.mem_get_info()[0]
    if needs <= free:
        return "cuda"
    said = "the GPU has %.1f GB free, and training takes about %.1f GB: it is done on the processor, which takes longer"
    log.warning(said, free / 1e9, needs / 1e9)
    return "cpu"


def seconds_per_token(network: nn.Module, items: Sequence[Encoded], pad: int) -> float:
    """Of one forward pass, measured: the second of two."""
    took = 0.0
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            logits(network, items, pad, "branch").cpu()  # waits for a GPU
            took = time.perf_counter() - start
    return took / max(1, sum(len(item.ids) for item in items))


def batch_tokens(network: Any) -> int:
    """Tokens in a batch: as many as make logits of 256 MB at most."""
    return max(128, min(BATCH_TOKENS, _LOGITS // vocabulary_size(network)))


def affordable(per_token: float, seconds: float, most_tokens: int) -> Steps | None:
    """The longest distillation within `seconds`, and no longer than pays; None where it would be too short to pay."""
    tokens = seconds / (_PASSES * per_token)
    size = int(min(most_tokens, max(_LEAST_TOKENS, tokens / STEPS)))
    steps = int(min(STEPS, tokens / size))
    if steps < _LEAST_STEPS:
        return None
    return Steps(steps, size, steps * size * _PASSES * per_token)


def shortest(per_token: float, most_tokens: int) -> Steps:
    """The shortest distillation that pays: for when it was asked for whatever it takes."""
    size = min(most_tokens, _LEAST_TOKENS)
    return Steps(_LEAST_STEPS, size, _LEAST_STEPS * size * _PASSES * per_token)
