"""The scripts that compare with other methods run, on a slice: each trains, merges, judges and prints its table."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_model

ROOT = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the scripts want it, with a tiny model and a little text."""
    folder = tmp_path_factory.mktemp("data")
    make_model("llama", folder / "tinystories656k-hf", hidden_size=64, intermediate_size=128)
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 150)
    return folder


def printed(
    name: str, given: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[list[str]]:
    """The cells of the table rows that a script prints."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
    runpy.run_path(str(ROOT / name), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[1:]]


def test_lora_merge_runs(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    given = ["--data-dir", data, "--only", "shakespeare", "--strength", "weak", "--steps", 2, "--seeds", 1]
    given += ["--auto-seeds", 0, "--group-size", 32, "--characters", 800, "--lora-lr", 0.01]
    rows = printed("lora_merge.py", given, monkeypatch, capsys)
    assert [row[3] for row in rows] == [
        f"{one}, {two}" for one in ("DiaBlo", "LoRA") for two in ("float branch", "requantized")
    ]
    assert all(re.fullmatch(r"\d\.\d{4} \(base \d\.\d{4}\)", row[4]) for row in rows)
    branch, merged = rows[0], rows[1]
    assert branch[5:7] == ["1.000", "1.000"] and branch[8:] == ["0.0%", "0 kB"]
    (none, wanted), (left, same) = (row[7].split(" of ") for row in (branch, merged))
    assert float(none) == 0 < float(left) and wanted == same  # rounding always costs something


def test_ternary_on_grid_runs(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data-dir", data, "--steps", 2, "--seeds", 1, "--characters", 800, "--tries", 1]
    ours, published, best = printed("ternary_on_grid.py", given, monkeypatch, capsys)
    assert published[1:] == best[1:]  # the one setting that was tried
    weights = [int(row[2].replace(",", "")) for row in (ours, published)]
    assert abs(weights[0] - weights[1]) < 0.2 * weights[0]  # ranks are whole numbers: 3 here
    assert ours[4] == published[4]  # both begin as the same int4 model


def test_float_road_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diablo_export.trainer.train import train

    text = (data / "tinyshakespeare" / "input.txt").read_text()
    for name, part in (("shakespeare", text[:2000]), ("shakespeare-held-out", text[-800:])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": part}) + "\n")
    train(
        data / "tinystories656k-hf", tmp_path / "shakespeare.jsonl", tmp_path / "shakespeare-adapter", num_blocks=4,
        max_steps=2, lr=0.05, max_length=32, target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    given = ["--data-dir", data, "--work", tmp_path, "--group-size", 32, "--method", "rtn", "--tokens", 256]
    whole, ours = printed("float_road.py", [*given, "--seed", 0, "--sequences", 2], monkeypatch, capsys)
    assert whole[1] == "float" and ours[1:3] == ["diablo-export, rtn", "4.50"]
    left, spread = ours[4].split(" ± ")
    assert 0 < float(left) < 1 and float(spread) == 0  # one seed
    assert float(ours[6]) > 0 and float(ours[8]) > 100  # seconds; megabytes, torch among them


def test_an_architecture_goes_the_whole_road() -> None:
    done = subprocess.run(  # of its own, as it silences the loggers
        [sys.executable, ROOT / "architectures.py", "mistral", "--task", "causal-lm"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.search(r"^\| mistral \| causal-lm \| 10 \|( \d\.\de[+-]\d\d \|){3}$", done.stdout, re.MULTILINE)
