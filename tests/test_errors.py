"""Packages of the extras: imported, or named with what installs them; the caller's logging is left alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diablo_export.errors import DependencyError, require


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(DependencyError, match=r"'no_such_package'.*pip install \"diablo-export\[peft\]\""):
        require("no_such_package", "peft")


def test_the_root_logger_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with onnxruntime's quantizer, which calls basicConfig() when it is imported."""
    shout = "logging.root.addHandler(logging.StreamHandler())\nlogging.root.setLevel(logging.INFO)\n"
    (tmp_path / "shouting_package.py").write_text(f"import logging\n{shout}")
    monkeypatch.syspath_prepend(tmp_path)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    require("shouting_package", "cpu")
    assert (root.handlers, root.level) == before
