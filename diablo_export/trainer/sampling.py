"""Text that a model writes itself: what a merge is held against when nobody gives text.

Sampled from the tuned model at temperature 1, from a random first token on, so that it shows what the fine-tune says
rather than what the base would. (LLM-QAT, arXiv 2305.17888, introduced sampling calibration text from the model.)
An encoder writes no text; for it there are sentences of random tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from diablo_export.trainer.data import Encoded

_AT_ONCE = 1 << 25  # logits of one step, over all sequences: 128 MB in float32
_MOST = 64  # sequences at once: their cache stays small


@torch.inference_mode()
def sample_text(
    network: nn.Module,
    tokenizer: Any,
    count: int,
    length: int,
    *,
    seed: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[Encoded]:
    """Sequences of tokens that a causal language model writes.

    Args:
        network: a Hugging Face model, in eval mode; it writes as the state that it is in.
        tokenizer: tells which tokens are special and never come first.
        count: how many sequences.
        length: tokens in each.
        seed: of first tokens and draws; on one kind of device the same seed gives the same text.
        advance: is called with the tokens done.
    """
    device = next(network.parameters()).device
    config: Any = network.config
    vocabulary = int(config.vocab_size)
    generator = torch.Generator(device).manual_seed(seed)
    first = torch.tensor(_ordinary(tokenizer, vocabulary), device=device)
    together = max(1, min(_MOST, _AT_ONCE // vocabulary))
    found: list[Encoded] = []
    while len(found) < count:
        rows = min(together, count - len(found))
        token = first[torch.randint(len(first), (rows, 1), generator=generator, device=device)]
        written, past = [token], None
        for _ in range(length - 1):
            output = network(input_ids=token, past_key_values=past, use_cache=True)
            past = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].float(), -1)
            token = torch.multinomial(chances, 1, generator=generator)
            written.append(token)
            advance(rows)
        ids = torch.cat(written, 1).cpu().numpy().astype(np.int32)
        found += [Encoded(row, np.ones(length, np.bool_)) for row in ids]
    return found


def random_sentences(tokenizer: Any, count: int, lengths: tuple[int, int], *, seed: int = 0) -> list[Encoded]:
    """Sentences of random ordinary tokens, with what the tokenizer puts around a text.

    Args:
        tokenizer: the model's.
        count: how many sentences.
        lengths: least and most tokens in each, without those around it.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    ordinary = _ordinary(tokenizer, len(tokenizer))
    found = []
    for _ in range(count):
        size = int(random.integers(lengths[0], lengths[1] + 1))
        drawn = [int(token) for token in random.choice(ordinary, size)]
        ids = np.array(_framed(tokenizer, drawn), np.int32)
        found.append(Encoded(ids, np.zeros(len(ids), np.bool_)))
    return found


def _ordinary(tokenizer: Any, vocabulary: int) -> list[int]:
    special = set(tokenizer.all_special_ids)
    return [token for token in range(min(len(tokenizer), vocabulary)) if token not in special] or list(
        range(vocabulary)
    )


def _framed(tokenizer: Any, tokens: list[int]) -> list[int]:
    """The tokens within the special ones that this tokenizer puts around any text."""
    around = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    inner = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    at = next(i for i in range(len(around) - len(inner) + 1) if around[i : i + len(inner)] == inner)
    return [*around[:at], *tokens, *around[at + len(inner) :]]
