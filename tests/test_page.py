"""The reports for people: one HTML page, and Markdown."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console

from diablo_export.measure.markdown import markdown
from diablo_export.measure.page import page
from diablo_export.measure.report import table
from diablo_export.measure.texts import first_difference
from tests import exports
from tests.test_report import CHECKS, made

Run = Callable[..., Result]
Get = Callable[[str], Path]

TEXT = {
    "adapter": "a", "prompt": "Say <b>", "base": "no", "tuned": "yes & more", "exported": "yes & less",
    "first_difference": 6,
}  # fmt: skip
MODULES = [
    {"name": f"model.layers.{layer}.self_attn.q_proj", "local_sqnr_db": 20.0 + layer, "inherited_sqnr_db": None,
     "survival_gain": 0.5 * layer, "survival_cosine": 1.0}
    for layer in range(3)
]  # fmt: skip


class Reader(HTMLParser):
    """Collects text by tag, and refuses tags that are not closed or reach for the network."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def full(**figures: Any) -> dict[str, Any]:
    report = made()
    histogram = {"edges": [1e-3, 1e-2], "counts": [5, 3, 0]}
    return {**report, "texts": [TEXT], "distribution": {"kl_median": 0.1, "kl_histogram": histogram}, **figures}


def test_the_page_says_everything_and_needs_nothing() -> None:
    reader = read(page(full(modules=MODULES, first_divergent_module=MODULES[1]["name"]), "int4 <x>"))
    assert reader.texts["h1"] == ["Parity of int4 <x>"]
    assert reader.texts["p"][0] == "FAIL: 1 of 3 checks held"
    assert reader.texts["code"][: len(CHECKS)] == [check["name"] for check in CHECKS]
    assert reader.texts["mark"] == ["less"]
    assert "Say <b>" in reader.texts["p"]
    # the histogram's tooltips, then a bar for each module; a heat map with a cell for each
    tips = reader.texts["title"][1:]
    assert tips[:3] == ["<1e-03: 5 positions", "1e-03: 3 positions", "1e-02: 0 positions"]
    assert tips[3] == "model.layers.0.self_attn.q_proj: local_sqnr_db 20"
    assert reader.texts["text"][-3:] == ["0", "1", "2"]  # the layers under them
    assert [text for text in reader.texts["td"] if text in ("0.000", "0.500", "1.000")] == ["0.000", "0.500", "1.000"]


def test_a_model_that_did_not_run_has_a_page_too() -> None:
    report = made(figures={}, environment={"fault": "onnxruntime <refuses>"})
    assert "onnxruntime <refuses>" in read(page(report, "x")).texts["p"]
    assert "> onnxruntime \\<refuses\\>" in markdown(report, "x")


def test_markdown_cannot_be_broken_by_a_text() -> None:
    evil = {**TEXT, "prompt": "a | b\n\n# c <img src=x> `d`"}
    lines = markdown(full(texts=[evil]), "int4").splitlines()
    assert lines[0] == "## ❌ Parity of int4: 1 of 3 checks held"
    assert r"| ❌ | `kl.mean@a<b` | 0.1235 | ≤ 0.1 | mean KL(tuned ‖ exported), in nats |" in lines
    (row,) = [line for line in lines if "img" in line]
    assert row.startswith(r"| a \| b # c \<img src=x\> \`d\` | no | yes & more |")


@pytest.mark.parametrize(
    ("one", "two", "at"), [("same", "same", None), ("abc", "abd", 2), ("ab", "abc", 2), ("", "x", 0)]
)
def test_first_difference(one: str, two: str, at: int | None) -> None:
    assert first_difference(one, two) == at


def test_parity_writes_both(tiny_model: Get, tiny_adapter: Get, run: Run, tmp_path: Path) -> None:
    out = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    files = [tmp_path / "r.html", tmp_path / "r.md"]
    result = run("parity", out, "--max-tokens", 160, "--steps", 6, "--html", files[0], "--markdown", files[1])
    assert result.exit_code == 0, result.output
    reader = read(files[0].read_text())
    assert reader.texts["p"][0] == "PASS: 13 of 13 checks held"
    assert reader.texts["b"] == ["base", "tuned", "exported"] * 3
    assert "mark" not in reader.texts  # float: the texts are one
    assert files[1].read_text().startswith("## ✅ Parity of out: 13 of 13 checks held")


def test_reports_of_several_adapters_say_whose_figures_they_show() -> None:
    several = made(environment={"adapter": "b", "adapters": ["a", "b"]})
    said = "of b, the worst of 2 adapters"
    html = page(several, "out")
    assert f"<h2>Figures {said}</h2>" in html and f"What follows the checks is {said}." in html
    assert f"<summary>Figures {said}</summary>" in markdown(several, "out")
    with (console := Console(width=80)).capture() as captured:
        console.print(table(several))
    assert f"Figures {said}" in captured.get()
    assert "the worst of" not in page(made(environment={"adapter": "a", "adapters": ["a"]}), "out")
