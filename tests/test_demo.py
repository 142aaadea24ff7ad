"""The demo: every stage on a few steps, its text sources, and the whole of it as `make demo` runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from diablo_export.converters import demo_model
from diablo_export.converters.demo import TOKENS, _sample

Run = Callable[..., Result]


def test_quick_demo_walks_the_whole_road(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("demo", "--quick", "--output", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    for title in ("base: English prose", "tuned: with blocks", "int4: blocks merged"):
        assert title in result.stdout
    assert "Loss on code" in result.stdout and "s in all" in result.stdout
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"base", "data", "adapter", "int4", "branch"}
    for folder in ("int4", "branch"):
        report = json.loads((tmp_path / "demo" / folder / "parity.json").read_text())
        assert report["adapter"]["alive"] and report["checks"]
    again = run("demo", "--quick", "--output", tmp_path / "demo")
    assert again.exit_code == 2 and "--overwrite" in again.stderr


def test_prose_is_prose() -> None:
    texts = demo_model.prose()
    assert sum(map(len, texts)) > 100_000 and len(texts) == len(set(texts))
    assert all("::=" not in text and "\n" not in text and text[0].isupper() for text in texts)


def test_functions_are_code_and_held_out_ones_are_not_trained_on(tmp_path: Path) -> None:
    train, test = demo_model.write_data(tmp_path)
    kept = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in (train, test)]
    assert len(kept[1]) > 50 and len(kept[0]) > 8 * len(kept[1])
    assert not set(kept[0]) & set(kept[1])
    for text in kept[1]:
        assert text.startswith("def ")
        compile(text, "held-out", "exec")


class Fixed:
    """A model with the same logits for every token."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = np.array(logits, np.float32)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return np.tile(self.logits, (len(ids), 1))


def test_the_same_logits_write_the_same_text_and_the_end_ends_it() -> None:
    written = _sample(Fixed([0.0, 1.0, 2.0]), end=0)
    assert written == _sample(Fixed([0.0, 1.0, 2.0]), end=0)
    assert set(written) <= {1, 2} and TOKENS // 2 - 1 <= len(written) <= TOKENS
    assert len(_sample(Fixed([99.0, 0.0, 0.0]), end=0)) == TOKENS // 2 - 1


@pytest.mark.slow
def test_demo_passes_and_the_adapter_shows(tmp_path: Path, run: Run) -> None:
    result = run("demo", "--output", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    from diablo_export.adapter import Adapter

    assert Adapter.load(tmp_path / "demo" / "adapter").num_blocks == 4
    for folder in ("int4", "branch"):
        report = json.loads((tmp_path / "demo" / folder / "parity.json").read_text())
        assert report["verdict"] == "pass" and report["adapter"]["survival_gain"] > 0.95
