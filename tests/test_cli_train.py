"""`diablo-export train` on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from diablo_export.adapter import Adapter


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("the cat sat on the mat\n\nthe dog sat on the log\n" * 20)
    return path


def test_trains_and_reports(
    run: Callable[..., Result], tiny_model: Callable[[str], Path], data: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    result = run(
        "train", "--model", tiny_model("llama"), "--data", data, "--output", tmp_path / "a", "--num-blocks", 4,
        "--target-modules", "q_proj, mlp.down_proj", "--max-steps", 2, "--max-length", 16,
        "--eval-fraction", 0.2, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    adapter = Adapter.load(tmp_path / "a")
    assert report["steps"] == 2 and report["parameters"] == adapter.parameters
    assert [entry["step"] for entry in report["evaluations"]] == [0, 1, 2]
    assert sorted({name.rpartition(".")[2] for name in adapter.modules}) == ["down_proj", "q_proj"]
    assert adapter.target_modules == ["q_proj", "mlp.down_proj"]
    assert "step 2 of 2: loss" in caplog.text and "step 2 of 2: held-out loss" in caplog.text


def test_of_several_processes_the_first_reports(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    from diablo_export.trainer import train as module

    done = module.Training(Path("a"), 1, 2, 3.0, [])
    monkeypatch.setattr(module, "train", lambda **options: done)
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        said.append(run("train", "--model", "m", "--data", "d", "--output", "a", "--json").stdout)
    assert json.loads(said[0])["loss"] == 3.0 and said[1] == ""


def test_bad_input_is_one_message_and_code_2(
    run: Callable[..., Result], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    result = run("train", "--model", tiny_model("llama"), "--data", tmp_path / "bad.jsonl", "--output", tmp_path / "a")
    assert result.exit_code == 2
    assert "bad.jsonl: bad lines" in result.stderr and "line 2: 'text' is a JSON number" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "a").exists()
    result = run("train", "--model", "m", "--data", "d", "--output", "o", "--task", "ner")
    assert result.exit_code == 2 and "'ner' is not one of 'causal-lm', 'text-classification'" in result.stderr


def test_help_has_an_example_and_every_option_of_the_verb(run: Callable[..., Result]) -> None:
    import inspect

    from diablo_export.trainer.train import train

    text = run("train", "--help").stdout
    assert "diablo-export train --model M --data train.jsonl" in text
    missing = [name for name in inspect.signature(train).parameters if f"--{name.replace('_', '-')}" not in text]
    assert not missing


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from diablo_export.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_interrupted_run_says_how_to_go_on(
    run: Callable[..., Result], tiny_model: Callable[[str], Path], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import signal

    from diablo_export.trainer.history import History

    arguments = [
        "train", "--model", tiny_model("llama"), "--data", data, "--output", tmp_path / "a", "--num-blocks", 4,
        "--max-steps", 3, "--max-length", 16,
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(History, "add", lambda self, **record: signal.raise_signal(signal.SIGTERM))
        result = run(*arguments)
    assert result.exit_code == 130
    assert "stopped after step 1 of 3; to go on: the same command with --resume" in caplog.text
    result = run(*arguments)
    assert result.exit_code == 2 and "continue it with --resume, or start anew with --overwrite" in result.stderr
    assert run(*arguments, "--resume").exit_code == 0
    assert Adapter.load(tmp_path / "a").modules
