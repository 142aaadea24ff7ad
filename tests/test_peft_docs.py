"""docs/peft.md runs from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from diablo_export.adapter import Adapter
from tests.test_docs import ROOT, blocks


def test_peft_page_runs_from_top_to_bottom(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny_model("llama"))
    monkeypatch.chdir(tmp_path)
    found = list(blocks(ROOT / "docs" / "peft.md"))
    assert [language for language, _ in found] == ["python"] * 3
    names: dict[str, Any] = {}
    for _, text in found:
        exec(text, names)
    assert len(Adapter.load(tmp_path / "adapter").modules) == 4
    assert (tmp_path / "branch" / "model.onnx").is_file() and (tmp_path / "merged" / "config.json").is_file()
    assert names["mixed"].shape[0] == 3 and type(names["whole"]).__name__ == "LlamaForCausalLM"
