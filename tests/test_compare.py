from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diablo_export.errors import DataError, ExportError
from diablo_export.measure import compare
from diablo_export.measure.prompts import Ids, Sample


class Counter:
    """A decoder over ten tokens that says one more than the last token, surely; `late` makes its cache lag."""

    def __init__(self, margin: float = 5.0, late: int = 0) -> None:
        self.margin, self.late = margin, late

    def _row(self, token: int) -> Any:
        row = np.zeros(10, np.float32)
        row[(token + 1) % 10] = self.margin
        return row

    def prefill(self, ids: Ids) -> Any:
        return np.stack([self._row(token) for token in ids])

    def decode(self, prompt: Ids, tokens: Ids) -> Any:
        text = [*prompt, *tokens[:-1]]
        return np.stack([
            self._row(text[max(len(prompt) - 1 + i - self.late * (i > 0), 0)]) for i in range(len(tokens))
        ])

    def greedy(self, prompt: Ids, steps: int) -> tuple[Ids, Any]:
        tokens = (prompt[-1] + 1 + np.arange(steps)) % 10
        return tokens, np.stack([self._row(token - 1) for token in tokens])


def decode(tuned: Any, exported: Any, steps: int = 6) -> compare.Decoded:
    return compare.decode(tuned, exported, [np.array([1, 2, 3]), np.array([7])], steps)


def test_equal_decoders_never_part() -> None:
    assert decode(Counter(), Counter()) == compare.Decoded(6, None, 0, 0.0, 0.0)


def test_a_cache_one_step_behind_parts_at_the_first_cached_step() -> None:
    found = decode(Counter(), Counter(late=1))
    assert (found.first_divergence, found.diverged, found.max_abs) == (1, 2, 5.0)
    assert found.cache > 1  # in deviations of the logits


def test_first_choices_within_float_noise_are_a_tie() -> None:
    near, far = compare.TIE * 0.9, compare.TIE * 1.5
    assert decode(Counter(near), Counter(late=1)).diverged == 0
    assert decode(Counter(far), Counter(late=1)).diverged == 2


def test_nan_parts_and_stays_visible() -> None:
    found = decode(Counter(), Counter(np.nan))
    assert found.diverged == 2 and np.isnan(found.max_abs)


def sample(ids: list[int], label: str | None = None) -> Sample:
    return Sample(np.array(ids), np.ones(len(ids), np.bool_), label)


def test_decoding_prompts_differ_in_length_leave_room_and_do_not_end() -> None:
    samples = [sample([*range(3, 90), 2]) for _ in range(6)]
    assert [len(p) for p in compare.decoding_prompts(samples, 2, 256, 10)] == [8, 16, 32, 64]
    assert [len(p) for p in compare.decoding_prompts(samples, 2, 40, 20)] == [8, 16, 20, 20]
    (short,) = compare.decoding_prompts([sample([5, 6, 2]), sample([2])], 2, 256, 10)
    assert list(short) == [5, 6]


def test_targets_are_the_next_tokens_that_count() -> None:
    one = Sample(np.array([4, 5, 6, 7]), np.array([False, False, True, True]))
    assert compare._targets(one, 4).tolist() == [-1, 6, 7, -1]  # type: ignore[union-attr]
    assert compare._targets(one, 1) is None  # a classifier's one row


def test_accuracy() -> None:
    samples = [sample([1], label) for label in ("no", "yes", "yes", "no")]
    choices = {"tuned": [0, 1, 1, 0], "exported": [0, 1, 0, 0], "base": [1, 0, 0, 1]}
    assert compare.accuracy(choices, samples, ["no", "yes"]) == {"tuned": 1.0, "exported": 0.75, "base": 0.0}
    assert compare.accuracy(choices, [sample([1])], ["no", "yes"]) is None
    with pytest.raises(DataError, match="labels yes are not the classifier's, which are no, maybe"):
        compare.accuracy(choices, samples, ["no", "maybe"])


def test_logits_of_another_model_are_refused() -> None:
    with pytest.raises(ExportError, match=r"gives logits of shape \(3, 12\), tuned \(3, 10\)"):
        compare.check_shapes(np.zeros((3, 10)), np.zeros((3, 12)))
