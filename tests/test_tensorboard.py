"""What TensorBoard reads is what training.jsonl says, also after a resumed run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diablo_export.errors import DependencyError
from diablo_export.trainer.tensorboard import event_files
from diablo_export.trainer.train import train


def test_curves_are_those_of_the_log(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 12}) + "\n")
    train(
        tiny_model("llama"), data, tmp_path / "a", num_blocks=4, max_length=16, batch_size=2, max_steps=3,
        eval_fraction=0.2, eval_every=2, tensorboard=tmp_path / "board",
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()]
    found = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    for curve, name in (("train/loss", "loss"), ("train/lr", "lr"), ("eval/loss", "eval_loss")):
        values = [(event.step, event.value) for event in found.Scalars(curve)]
        expected = [(record["step"], record[name]) for record in records if name in record]
        assert [step for step, _ in values] == [step for step, _ in expected]
        # event files hold float32
        assert [value for _, value in values] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert len(found.Scalars("train/tokens_per_second")) == 3


def test_steps_that_a_killed_run_had_logged_are_hidden(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, [1.0, 2.0, 3.0]), (2, [4.0])):
        with event_files(tmp_path, start) as add:
            for step, loss in enumerate(values, start + 1):
                add({"step": step, "loss": loss, "tokens": 1, "seconds": 1.0})
    found = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in found] == [(1, 1.0), (2, 2.0), (3, 4.0)]


def test_without_the_package_it_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(DependencyError, match=r'pip install "diablo-export\[tensorboard\]"'):
        train("model", "data", tmp_path / "a", tensorboard=tmp_path / "board")
    assert not list(tmp_path.iterdir())
