"""The grid that a task gets when nobody asked for another."""

from __future__ import annotations

import pytest

from diablo_export.converters.sizes import grid


@pytest.mark.parametrize(
    ("task", "asked", "given"),
    [
        ("CAUSAL_LM", (None, None), (32, False)),
        ("SEQ_CLS", (None, None), (16, True)),
        ("CAUSAL_LM", (128, True), (128, True)),
        ("SEQ_CLS", (64, False), (64, False)),
    ],
)
def test_what_was_asked_for_goes_before_the_task(
    task: str, asked: tuple[int | None, bool | None], given: tuple[int, bool]
) -> None:
    assert grid(task, *asked) == given
