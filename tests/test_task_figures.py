"""Loss and accuracy of a merge's answers, on text that says what is right."""

from __future__ import annotations

import numpy as np
import pytest

from diablo_export.measure.survival import task
from diablo_export.trainer.data import IGNORED, Encoded


def item(ids: list[int], target: list[bool] | None = None, label: int = IGNORED) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(target or [True] * len(ids)), label)


def test_loss_of_the_next_token() -> None:
    # two sequences in one batch; the first token is predicted by nothing, and the last predicts nothing
    batch = [item([0, 1, 2]), item([2, 0], [True, False])]
    logits = np.zeros((5, 3), np.float32)
    logits[0, 1] = 20  # sure of the 1 that follows, and right; the second is a guess among three
    logits[3, 1] = 20  # sure and wrong, but that token does not count
    assert task([batch], [logits])["loss"] == pytest.approx((0 + np.log(3)) / 2, abs=1e-6)


def test_accuracy_of_those_with_a_label() -> None:
    batch = [item([5, 6, 7], label=0), item([5, 6], label=1), item([5, 6])]
    logits = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert task([batch, batch], [logits, logits]) == {"accuracy": 0.5}


def test_nothing_is_known() -> None:
    assert task([[item([5, 6, 7])]], [np.zeros((1, 2), np.float32)]) == {}
    assert task([[item([5, 6], [False, False])]], [np.zeros((2, 9), np.float32)]) == {}
