"""A disk that runs full, in the two places where it was a traceback or left half of a file: files may not grow here."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diablo_export.converters.diablo_chkpt import convert
from diablo_export.converters.merge import merge
from diablo_export.errors import OutputError
from diablo_export.measure.survival_picture import draw
from diablo_export.timing import report as bench_report

Get = Callable[[str], Path]


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 4 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_beside_the_weights(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    model, adapter = tiny_model("llama"), tiny_adapter("llama")
    with small_files(), pytest.raises(OutputError, match="a file grew past what this disk or the limit"):
        merge(model, adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_paper_s_file(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    model, adapter = tiny_model("llama"), tiny_adapter("llama")
    with small_files(), pytest.raises(OutputError, match="a file grew past what this disk or the limit"):
        convert(adapter, model, tmp_path / "adapter.chkpt")
    assert not any(tmp_path.iterdir())


def test_pictures(tmp_path: Path) -> None:
    row = {"method": "rtn", "gain": 0.9, "cosine": 0.8, "kl": 0.1, "modules": {"l.0.q": {"gain": 1.0, "cosine": 1.0}}}
    with small_files(), pytest.raises(OutputError, match=r"kept\.png: a file grew past"):
        draw([row], tmp_path / "kept.png", "kept")
    figures = {"ratio": {"median": 1.1, "low": 1.0, "high": 1.2}, "seconds": {"median": 0.1}}
    work = {"name": "prompt", "variants": {"base": figures, "branch": figures}}
    report: dict[str, Any] = {"model": "m", "adapter": "a", "work": [work]}
    report |= {"variants": work["variants"], "environment": {"threads": None}}
    with small_files(), pytest.raises(OutputError, match=r"bench\.png: a file grew past"):
        bench_report.draw(report, tmp_path / "bench.png")
    assert not any(tmp_path.iterdir())
