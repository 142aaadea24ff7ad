from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from diablo_export.errors import DataError
from diablo_export.measure.prompts import PROMPTS, collect

Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Get) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_built_in_prompts_come_whole(tokenizer: Any) -> None:
    samples = collect(tokenizer, None, window=4096)
    assert len(samples) == len(PROMPTS)
    assert tokenizer.decode(samples[1].ids, skip_special_tokens=True) == "The"
    assert len({len(sample.ids) for sample in samples}) > 8  # of many lengths


def test_a_long_text_continues_in_the_next_window(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": "the cat sat on the mat and the dog sat on the log " * 4}])
    (whole,) = collect(tokenizer, data, window=4096)
    pieces = collect(tokenizer, data, window=10)
    assert {len(piece.ids) for piece in pieces[:-1]} == {10}
    np.testing.assert_array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)


def test_only_a_completion_counts(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "the cat ", "completion": "sat"}])
    (sample,) = collect(tokenizer, data, window=64)
    assert not sample.target[0] and sample.target[-1]


def test_max_tokens_bounds_the_work(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": "the cat sat on the mat"}] * 20)
    assert sum(len(sample.ids) for sample in collect(tokenizer, data, window=64, max_tokens=25)) == 25


def test_a_classifier_s_text_is_cut_and_never_halved_by_the_bound(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"text": "the cat sat on the mat " * 9, "label": "a"}, {"text": "a dog", "label": "b"}] * 2
    data = write(tmp_path / "d.jsonl", lines)
    samples = collect(tokenizer, data, window=12, classifier=True)
    assert [sample.label for sample in samples] == ["a", "b", "a", "b"]
    assert len(samples[0].ids) == 12
    few = collect(tokenizer, data, window=12, classifier=True, max_tokens=len(samples[1].ids) + 1)
    assert [sample.label for sample in few] == ["b"]


def test_the_draw_depends_on_the_seed_only(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": f"number {i}"} for i in range(50)])

    def drawn(seed: int) -> list[list[int]]:
        return [list(sample.ids) for sample in collect(tokenizer, data, window=64, samples=4, seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(drawn(0)) == 4


def test_bounds_that_leave_nothing_are_named(tokenizer: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": "the cat sat on the mat", "label": "a"}])
    with pytest.raises(DataError, match=r"d\.jsonl: nothing to compare: 1 examples within .*--max-tokens 1 give no"):
        collect(tokenizer, data, window=64, classifier=True, max_tokens=1)
