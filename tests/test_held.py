"""Limits from a parity.toml, and a baseline."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from diablo_export.errors import InputError
from diablo_export.measure import held
from diablo_export.measure.prompts import Sample, digest
from tests import exports
from tests.test_report import made

Get = Callable[[str], Path]
Run = Callable[..., Result]
SMALL = ("--max-tokens", 160, "--steps", 6, "--threads", 1)


def toml(folder: Path, text: str) -> Path:
    file = folder / "parity.toml"
    file.write_text(text)
    return file


def test_a_precision_goes_before_all(tmp_path: Path) -> None:
    file = toml(
        tmp_path, '[int4]\n"kl.mean" = 1\n[all]\n"kl.mean" = 0.5\ntop1_agreement = 0.9\n[fp32]\n"kl.max" = 0.0\n'
    )
    assert held.from_toml(file, "int4") == {"kl.mean": 1.0, "top1_agreement": 0.9}
    assert held.from_toml(file, "fp32") == {"kl.mean": 0.5, "top1_agreement": 0.9, "kl.max": 0.0}
    assert held.from_toml(file, "int8") == {"kl.mean": 0.5, "top1_agreement": 0.9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[all", "is no TOML"),
        ("[int3]\n", r"has 'int3'; its tables are \[all\] and \[fp32\], \[fp16\]"),
        ('"kl.mean" = 1', r"has 'kl.mean'; its tables are"),
        ("[all]\nkl.mean = 1", r'\[all\] kl: put names with a dot in quotes: "kl.mean"'),
        ('[all]\n"kl.mean" = "low"', r"\[all\] kl.mean is 'low'; a limit is a number"),
        ("[int4]\nspeed = 1", r"(?s)\[int4\] --limit speed=1: no such figure"),
        ('[int4]\n"baseline.kl.mean" = 1', "no such figure"),
    ],
)
def test_a_wrong_file_is_refused_whatever_the_precision(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        held.from_toml(toml(tmp_path, text), "fp32")


def report(**changes: Any) -> dict[str, Any]:
    found = made()
    found["adapter"] = {"alive": True, "survival_gain": 0.98, "survival_cosine": 0.99}
    found["distribution"] = {"kl_error": 0.01, "perplexity_error": {"ratio": 0.001}}
    found["environment"] = {"data": "d", "tokens": 9}
    return {**found, **changes}


def test_the_same_report_is_no_worse() -> None:
    checks = held.no_worse(report(), report())
    assert [check["name"] for check in checks] == [
        "baseline.kl.mean", "baseline.top1_agreement", "baseline.perplexity", "baseline.survival_gain.error",
        "baseline.survival_cosine",
    ]  # fmt: skip
    assert all(check["pass"] for check in checks)


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [  # what the baseline has, a little worse, and worse by more than noise
        ("kl", {"mean": 0.1434}, {"mean": 0.1436}),  # 0.1235 and two standard errors of 0.01
        ("perplexity", {"exported": 11.02}, {"exported": 11.03}),  # 11 and two standard errors of 0.001 · 11
        ("top1_agreement", 0.86, 0.85),  # 0.9 less a twentieth
        ("adapter", {"survival_gain": 1.029}, {"survival_gain": 1.031}),  # 0.02 from 1, and 0.01
    ],
)
def test_worse_by_more_than_noise_fails(name: str, within: Any, beyond: Any) -> None:
    passed = [all(c["pass"] for c in held.no_worse(report(**{name: value}), report())) for value in (within, beyond)]
    assert passed == [True, False]


def test_other_ground_is_no_baseline() -> None:
    other = report(environment={"data": "other", "tokens": 9})
    with pytest.raises(InputError, match=r"old.json: was measured on other ground: data was other, now d"):
        held.compare(report(), other, "old.json")


def test_ground_is_told_by_what_was_read_and_not_by_its_file() -> None:
    now = report(environment={"data": "d", "tokens": 9, "samples_xxh3": "a1"})
    moved = report(environment={"data": "elsewhere/d", "tokens": 9, "samples_xxh3": "a1"})
    held.compare(now, moved, "old.json")
    edited = report(environment={"data": "d", "tokens": 9, "samples_xxh3": "b2"})
    with pytest.raises(InputError, match=r"old.json: was measured on other ground: the data d has changed since"):
        held.compare(now, edited, "old.json")
    held.compare(now, report(), "old.json")  # of a version that did not write it down


def test_samples_are_told_apart_by_tokens_labels_and_what_counts() -> None:
    def sample(ids: list[int], counted: int = 1, label: Any = None) -> Sample:
        return Sample(np.array(ids, np.int64), np.arange(len(ids)) >= counted, label)

    lists = [
        [sample([5, 6]), sample([7])],
        [sample([5]), sample([6, 7])],
        [sample([5, 6]), sample([8])],
        [sample([5, 6], 2), sample([7])],
        [sample([5, 6], 1, "good"), sample([7])],
    ]
    assert len({digest(samples) for samples in lists}) == len(lists)
    assert digest(lists[0]) == digest([sample([5, 6]), sample([7])])


def test_from_the_command_line(tiny_model: Get, tiny_adapter: Get, run: Run, tmp_path: Path) -> None:
    out = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    file, old = toml(tmp_path, '[fp32]\n"kl.mean" = 1e-12\naccuracy.drop = 1\n'), tmp_path / "old.json"
    assert run("parity", out, *SMALL, "-q", "--limits", file).exit_code == 2  # unquoted
    file = toml(tmp_path, '[fp32]\n"logits.mean_abs" = 0.0\n"accuracy.drop" = 1\n')
    result = run("parity", out, *SMALL, "-q", "--limits", file, "--json", old)
    assert result.exit_code == 1 and "logits.mean_abs" in result.stderr and "accuracy" not in result.stderr
    assert run("parity", out, *SMALL, "-q", "--baseline", old).exit_code == 0
    data = tmp_path / "data.txt"
    data.write_text("the cat sat on the mat")
    short = ("parity", out, *SMALL, "-q", "--no-modules", "--data", data)
    assert run(*short, "--json", tmp_path / "text.json").exit_code == 0
    data.write_text("the dog sat on the log")  # as many tokens
    result = run(*short, "--baseline", tmp_path / "text.json")
    assert result.exit_code == 2 and "has changed since" in result.stderr
    better = copy.deepcopy(json.loads(old.read_text()))
    better["adapter"]["survival_cosine"] = 2.0
    old.write_text(json.dumps(better))
    result = run("parity", out, *SMALL, "-q", "--baseline", old)
    assert result.exit_code == 1 and "baseline.survival_cosine 1 (limit ≥ 1.9)" in result.stderr
    result = run("parity", out, *SMALL, "-q", "--baseline", tmp_path / "nothing.json")
    assert result.exit_code == 2 and "nothing.json: no such file; leave it out until there is a" in result.stderr
    (tmp_path / "empty.json").write_text("[]")
    assert "cannot be read as a parity.json" in run("parity", out, "--baseline", tmp_path / "empty.json").stderr
