"""The log, the loss curve and what is shown while a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diablo_export.trainer.history import History, draw, running_mean, training_bar


def test_log_is_appended_at_once_and_rewritten_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "training.jsonl"
    history = History(file, [])
    history.add(step=1, loss=2.0)
    history.add(step=1, eval_loss=3.0)
    assert [json.loads(line) for line in file.read_text().splitlines()] == history.records
    assert history.column("eval_loss") == ([1], [3.0])
    resumed = History(file, [{"step": 1, "loss": 2.0}])
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n' and resumed.column("loss") == ([1], [2.0])


def test_running_mean_covers_a_twentieth() -> None:
    assert running_mean([1.0, 3.0, 5.0]) == [1.0, 3.0, 5.0]
    assert running_mean([1.0, 3.0, *[5.0] * 38])[:4] == [1.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize("evaluated", [False, True])
def test_picture_shows_what_there_is(evaluated: bool, tmp_path: Path) -> None:
    records: list[dict[str, float]] = [{"step": step, "loss": 1 / step} for step in range(1, 41)]
    plain = History(tmp_path / "log", list(records))
    draw(plain, tmp_path / "plain.png", "title")
    full = History(tmp_path / "log", records + [{"step": 20, "eval_loss": 0.5, "eval_accuracy": 0.8}] * evaluated)
    draw(full, tmp_path / "full.png", "title")
    assert ((tmp_path / "plain.png").read_bytes() != (tmp_path / "full.png").read_bytes()) == evaluated


@pytest.mark.parametrize("title", ["model on a$1_$.jsonl", "m on $b^^c$ 100%", "model_x on $.txt"])
def test_titles_are_no_formulas_and_other_pictures_are_left_alone(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")  # as a notebook has its own
    draw(History(tmp_path / "log", [{"step": 1, "loss": 2.0}]), tmp_path / "loss.png", title)
    assert matplotlib.get_backend() == "svg"


def test_without_a_terminal_every_tenth_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "diablo_export"), training_bar(30) as show:
        for step in range(1, 31):
            show(step, 2.5, 1234.0)
    assert len(caplog.messages) == 10
    assert caplog.messages[-1] == "step 30 of 30: loss 2.500, 1,234 tokens/s"


def test_terminal_bar_shows_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("diablo_export.trainer.history.stderr", lambda: screen)
    monkeypatch.setattr("diablo_export.trainer.history.log.level", 20)
    with training_bar(4, start=1) as show:
        show(2, 2.5, 1234.0)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "2/4" in shown and "loss 2.500 · 1,234 tokens/s" in shown and "left" in shown
