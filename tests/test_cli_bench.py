from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.test_bench import size_of_png

Get = Callable[..., Path]
Run = Callable[..., Result]
QUICK = ("--prefill", 8, "--past", 4, "--rounds", 3, "--threads", 1, "--only", "branch", "--only", "lora")


def test_a_table_a_report_and_a_picture(exported: Get, run: Run, tmp_path: Path) -> None:
    json_file, png_file = tmp_path / "r.json", tmp_path / "r.png"
    result = run("bench", exported("llama"), *QUICK, "--json", json_file, "--png", png_file)
    assert result.exit_code == 0, result.output
    for said in (
        "prefill 8, 3 rounds",
        "decode at 4, 3 rounds",
        " lora ",
        "× base",
        "processor",
        "lora: 15,616 parameters",
    ):
        assert said in result.stdout
    assert "…" not in result.stdout
    assert [work["name"] for work in json.loads(json_file.read_text())["work"]] == ["prefill 8", "decode at 4"]
    assert size_of_png(png_file) == (1500, 675)


def test_json_alone_goes_to_standard_output(exported: Get, run: Run) -> None:
    result = run("bench", exported("llama"), *QUICK, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report) == ["format_version", "model", "adapter", "variants", "work", "environment"]
    assert report["environment"]["threads"] == 1 and report["environment"]["provider"] == "CPUExecutionProvider"


def test_quiet_prints_nothing(exported: Get, run: Run) -> None:
    result = run("bench", exported("llama"), *QUICK, "-q")
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prefill", 300), "cannot run prefill 300; lengths go from 1 to 256 tokens"),
        (("--prefill", 0), "0 is not in the range x>=1"),
        (("--rounds", 2), "2 is not in the range x>=3"),
        (("--adapter", "c"), "--adapter c: "),
        (("--json", "/nowhere/r.json"), "--json /nowhere/r.json: no such folder"),
        (("--merged", "/nowhere"), "/nowhere: no such folder"),
    ],
)
def test_bad_input_exits_2_with_one_message(options: tuple[str, ...], message: str, exported: Get, run: Run) -> None:
    result = run("bench", exported("llama"), "-q", "--prefill", 8, *options)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_folder_without_a_model_exits_2(run: Run, tmp_path: Path) -> None:
    result = run("bench", tmp_path)
    assert result.exit_code == 2
    assert "was not made by diablo-export merge or export" in result.stderr
