"""Exports of a real model for these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from diablo_export.converters.export import export
from tests import tiny


@pytest.fixture(scope="session")
def real_exports(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """TinyStories-656K with random adapters a and b: exported to swap, and for the web."""
    model, folder = real_data / "tinystories656k-hf", tmp_path_factory.mktemp("real")
    adapters = {
        name: tiny.make_adapter(model, folder / name, num_blocks=blocks, scale=0.05, seed=blocks)
        for name, blocks in (("a", 4), ("b", 8))
    }
    for for_ in ("ort", "web"):
        export(model, adapters, folder / for_, for_=for_)
    return folder / "ort", folder / "web"
