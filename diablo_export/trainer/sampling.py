"""Text that a model writes itself: what a merge is held against when nobody gives text.

Sampled from the tuned model, from a random first token on. (LLM-QAT, arXiv 2305.17888, introduced sampling calibration
text from the model.) A model that was tuned a little still writes as its base did, where the fine-tune has little to
say; `telling_text` goes where it has much. An encoder writes no text; for it there are sentences of random tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diablo_export.trainer.data import Encoded
from diablo_export.trainer.grid import State, set_state
from diablo_export.trainer.model import vocabulary_size

_AT_ONCE = 1 << 25  # logits of one step, over all sequences: 128 MB in float32
_MOST = 64  # sequences at once: their cache stays small
_CANDIDATES = 4  # for each token of a telling text
WRITING = 2 * _CANDIDATES  # what a telling text costs, in times that it is read
_AHEAD = 6.0  # how far beyond the fine-tune candidates are drawn, at most


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
    device, vocabulary = next(network.parameters()).device, vocabulary_size(network)
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


@torch.inference_mode()
def telling_text(network: nn.Module, tokenizer: Any, count: int, length: int, *, seed: int = 0) -> list[Encoded]:
    """Sequences that a causal language model writes and in which its fine-tune has much to say.

    Four candidates for each token are drawn from the tuned model with the fine-tune's effect on its logits enlarged, by
    1 in some sequences and up to 7 in others. One of them is taken, by the square of KL(branch ‖ base) of what comes
    after it: text on which two models differ most is where one is best made to be like the other.

    Args:
        network: a Hugging Face model that holds `GridLinear` layers, in eval mode.
        tokenizer: tells which tokens are special and never come first.
        count: how many sequences.
        length: tokens in each.
        seed: as `sample_text`'s.
    """
    device, vocabulary = next(network.parameters()).device, vocabulary_size(network)
    generator = torch.Generator(device).manual_seed(seed)
    first = torch.tensor(_ordinary(tokenizer, vocabulary), device=device)
    together = max(1, min(_MOST, _AT_ONCE // (vocabulary * WRITING)))
    found: list[Encoded] = []
    while len(found) < count:
        rows = min(together, count - len(found))
        token = first[torch.randint(len(first), (rows, 1), generator=generator, device=device)]
        ahead = 1 + _AHEAD * torch.rand((rows, 1), generator=generator, device=device)
        both, written = _Both(network), [token]
        both.read(token)
        for _ in range(length - 1):
            chances = torch.softmax(both.base + ahead * (both.branch - both.base), -1)
            drawn = torch.multinomial(chances, _CANDIDATES, replacement=True, generator=generator)
            both.repeat(_CANDIDATES)
            both.read(drawn.reshape(-1, 1))
            told = both.divergence().reshape(rows, _CANDIDATES).square() + 1e-30  # one of them, where nothing is said
            chosen = torch.multinomial(told / told.amax(-1, keepdim=True), 1, generator=generator)
            both.keep((chosen + _CANDIDATES * torch.arange(rows, device=device)[:, None]).flatten())
            written.append(drawn.gather(1, chosen))
        ids = torch.cat(written, 1).cpu().numpy().astype(np.int32)
        found += [Encoded(row, np.ones(length, np.bool_)) for row in ids]
    return found


class _Both:
    """Base and branch of a network, reading the same text token by token.

    Attributes:
        base: logits after the last token, (rows, vocabulary).
        branch: the same.
    """

    base: Tensor
    branch: Tensor

    def __init__(self, network: Any) -> None:
        self._network = network
        self._past: dict[State, Any] = {"base": None, "branch": None}

    def read(self, token: Tensor) -> None:
        """Read one more token in each row, (rows, 1)."""
        for state in self._past:
            set_state(self._network, state)
            output = self._network(input_ids=token, past_key_values=self._past[state], use_cache=True)
            self._past[state] = output.past_key_values
            setattr(self, state, output.logits[:, -1].float())

    def repeat(self, times: int) -> None:
        """Have each row `times` times."""
        rows = torch.arange(len(self.base), device=self.base.device).repeat_interleave(times)
        for past in self._past.values():
            past.reorder_cache(rows)  # of those that take rows from a cache, the one that states of other kinds have

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows."""
        for past in self._past.values():
            past.reorder_cache(rows)
        self.base, self.branch = self.base[rows], self.branch[rows]

    def divergence(self) -> Tensor:
        """KL(branch ‖ base) of each row."""
        branch, base = torch.log_softmax(self.branch, -1), torch.log_softmax(self.base, -1)
        return (branch.exp() * (branch - base)).sum(-1).clamp_min(0)


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
