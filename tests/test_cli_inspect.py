"""diablo-export inspect on the command line: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from diablo_export.cli.inspect import show, text

Folder = Callable[[str], Path]
Run = Callable[..., Result]


def test_table(tiny_adapter: Folder, tiny_model: Folder, run: Run) -> None:
    result = run("inspect", tiny_adapter("llama"), "--model", tiny_model("llama"))
    assert result.exit_code == 0, result.output
    assert "DiaBlo adapter" in result.stdout and "4 × 24 × 16" in result.stdout
    assert [line.split() for line in result.stdout.splitlines() if line.startswith("fits")] == [["fits", "yes"]]


def test_what_does_not_fit_is_exit_code_1(tiny_adapter: Folder, tiny_model: Folder, run: Run) -> None:
    result = run("inspect", tiny_adapter("llama"), "--model", tiny_model("gpt2"))
    assert result.exit_code == 1 and "14 of 14 modules do not fit" in " ".join(result.stdout.split())
    assert result.stderr.endswith(f"does not fit {tiny_model('gpt2')}\n")


def test_json(tiny_model: Folder, run: Run) -> None:
    result = run("inspect", tiny_model("llama"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kind"] == "Hugging Face checkpoint"


def test_unknown_things_are_exit_code_2(tmp_path: Path, run: Run) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 2 and "nothing that is known here" in result.stderr and "Traceback" not in result.stderr


def test_brackets_survive_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    show({"inputs": ["input_ids int64 [batch, sequence]"], "empty": [], "none": None})
    shown = capsys.readouterr().out
    assert "[batch, sequence]" in shown and "empty" not in shown and "none" not in shown


def test_values_read_as_people_write_them() -> None:
    assert text(1234567) == "1,234,567" and text(True) == "yes" and text(None) == ""
    assert text({"F32": 3, "I8": [1, 2]}) == "F32 3, I8 1, 2"
