from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from diablo_export.errors import CheckFailed, OutputError
from diablo_export.measure import report
from diablo_export.measure.markdown import markdown

CHECKS = [
    {"name": "files", "value": 0.0, "limit": 0, "pass": True},
    {"name": "kl.mean@a<b", "value": 0.123456, "limit": 0.1, "pass": False},
    {"name": "adapter.survival_gain", "value": math.nan, "limit": 0.95, "pass": False},
]


def made(**changes: Any) -> dict[str, Any]:
    figures = {
        "logits": {"max_abs": 1.5, "mean_abs": 0.1, "cosine": 0.99, "sqnr_db": math.inf},
        "kl": {"mean": 0.123456, "p99": 0.5, "max": 1.0},
        "top1_agreement": 0.9,
        "perplexity": {"tuned": 10.0, "exported": 11.0, "base": 99.0},
        "decode": {"steps": 32, "first_divergence": None, "max_abs": 0.5},
        "adapter": {"alive": True, "survival_gain": math.nan, "survival_cosine": 0.5},
    }
    arguments: dict[str, Any] = {
        "checks": CHECKS, "figures": figures, "classifier": False, "environment": {}, "hashes": {"changed": []},
    }  # fmt: skip
    return report.make(**{**arguments, **changes})


def test_the_verdict_is_that_of_every_check() -> None:
    assert made()["verdict"] == "fail"
    assert made(checks=CHECKS[:1])["verdict"] == "pass"
    assert made(checks=[])["verdict"] == "fail"  # nothing held is nothing proven


def test_what_was_not_measured_is_none() -> None:
    empty = made(figures={})
    assert list(empty) == list(made())
    assert empty["logits"] is None and empty["modules"] == []


def test_a_classifier_has_accuracy_in_place_of_perplexity_and_decode() -> None:
    plain, classifier = set(made()), set(made(classifier=True))
    assert plain - classifier == {"perplexity", "decode"}
    assert classifier - plain == {"accuracy"}


def test_json_is_strict_and_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "parity.json"
    report.write_json(made(), file)
    text = file.read_text()
    assert "NaN" not in text and "Infinity" not in text
    read = json.loads(text)
    assert read["logits"]["sqnr_db"] is None and read["checks"][2]["value"] is None

    def full(self: Path, *arguments: Any, **more: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"parity\.json: cannot be written: No space left on device"):
        report.write_json(made(checks=[]), file)
    assert file.read_text() == text
    assert [path.name for path in file.parent.iterdir()] == ["parity.json"]


def test_junit_has_a_case_for_each_check(tmp_path: Path) -> None:
    report.write_junit(made(), tmp_path / "junit.xml")
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    (suite,) = root.findall("testsuite")
    assert (root.tag, suite.get("tests"), suite.get("failures")) == ("testsuites", "3", "2")
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert list(cases) == ["files", "kl.mean@a<b", "adapter.survival_gain"]
    failures = [name for name, case in cases.items() if case.find("failure") is not None]
    assert failures == ["kl.mean@a<b", "adapter.survival_gain"]
    message = cases["kl.mean@a<b"].find("failure").get("message")  # type: ignore[union-attr]
    assert message == "0.1235, limit ≤ 0.1: mean KL(tuned ‖ exported), in nats"


def test_every_report_says_how_many_modules_were_looked_into_and_names_the_first_that_diverges(tmp_path: Path) -> None:
    rows = [
        {"name": "a.q_proj", "fault": None},
        {"name": "a.o_proj", "fault": "input"},
        {"name": "b", "fault": "output"},
    ]
    figures = {"modules": rows, "first_divergent_module": "a.o_proj"}
    checks = [{"name": "modules.faulty", "value": 2.0, "limit": 0.0, "pass": False}]
    found = made(checks=checks, figures=figures, environment={"modules_not_found": {"c": "its bias is elsewhere"}})
    said = "3 looked into, 2 faulty, the first a.o_proj (input); 1 not found in the graph"
    assert report.modules_line(found) == said
    report.write_junit(found, tmp_path / "junit.xml")
    assert said in (tmp_path / "junit.xml").read_text()
    assert said.replace("_", "\\_") in markdown(found, "out")
    console = Console(width=200, file=io.StringIO())
    console.print(report.table(found))
    assert said in console.file.getvalue()
    assert report.modules_line(made()) is None and "Modules" not in markdown(made(), "out")


def test_a_failure_names_checks_values_and_limits(tmp_path: Path) -> None:
    expected = (
        r"^out: parity failed: kl\.mean@a<b 0\.1235 \(limit ≤ 0\.1\), adapter\.survival_gain none \(limit ≥ 0\.95\)$"
    )
    with pytest.raises(CheckFailed, match=expected):
        report.require_pass(made(), Path("out"))
    with pytest.raises(CheckFailed, match=r"; changed since the export: a\.bin, b\.bin; onnxruntime cannot run it$"):
        changed = {"changed": ["a.bin", "b.bin"]}
        report.require_pass(made(hashes=changed, environment={"fault": "onnxruntime cannot run it"}), Path("out"))
    report.require_pass(made(checks=CHECKS[:1]), Path("out"))


@pytest.mark.parametrize("classifier", [True, False])
def test_the_table_fits_80_columns(classifier: bool) -> None:
    long = {"name": "adapter.survival_gain.error@a-rather-long-adapter-name", "value": 1.23456789e-7, "limit": 1e-3}
    checks = [*CHECKS, {**long, "pass": True}]
    figures = {"accuracy": {"tuned": 0.5, "exported": 0.5, "base": 0.25}, "top1_agreement": 1.0}
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(
        report.table(made(checks=checks, classifier=classifier, **({"figures": figures} if classifier else {})))
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "1.235e-07 ≤ 0.001" in " ".join(text.replace("│", " ").split())
    assert "FAIL: 2 of 4 checks held" in text
    assert ("accuracy" in text) is classifier and ("perplexity" in text) is not classifier
