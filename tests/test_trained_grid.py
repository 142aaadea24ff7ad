"""The grid that an output gets when nobody asked for another, and the warning where it is not the trained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.converters.export import load_adapters
from diablo_export.converters.merge import merge
from diablo_export.converters.trained_grid import numbers, output_grid, warn_of_another


@pytest.mark.parametrize(
    ("task", "asked", "given"),
    [
        ("CAUSAL_LM", (None, None), (32, False)),
        ("SEQ_CLS", (None, None), (16, True)),
        ("CAUSAL_LM", (128, True), (128, True)),
        ("SEQ_CLS", (64, False), (64, False)),
    ],
)
def test_what_was_asked_for_goes_before_the_task(
    task: str, asked: tuple[int | None, bool | None], given: tuple[int, bool]
) -> None:
    assert output_grid([Adapter({}, task)], "int4", *asked) == given


def test_what_was_trained_on_goes_before_the_task() -> None:
    adapter = Adapter({}, base_grid=BaseGrid(4, 128, symmetric=False))
    assert output_grid([adapter], "int4", None, None) == (128, True)
    assert output_grid([adapter], "int4", 64, False) == (64, False)
    assert output_grid([adapter], "int8", None, None) == (32, False), "trained on other bits says nothing of these"


def test_another_grid_than_the_trained_one_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    adapter = Adapter({}, base_grid=BaseGrid(4, 32, symmetric=True))
    warn_of_another([adapter, Adapter({})], [numbers("int4", 32, False)])
    assert not caplog.records
    warn_of_another([adapter], [numbers("int4", 128, True)])
    warn_of_another([adapter], [numbers("none", 32, False)])
    assert "trained beside int4 in groups of 32, symmetric weights" in caplog.messages[0]
    assert "the base here is int4 in groups of 128, asymmetric" in caplog.messages[0]
    assert "the base here is float" in caplog.messages[1]
    assert caplog.messages[1].endswith("--quantize int4 --group-size 32 --symmetric")


def test_an_adapter_that_only_sizes_can_tell_is_said_to_be_one(
    tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    marked = Adapter.load(tiny_adapter("llama"))
    modules = {name: replace(module, fingerprint=None) for name, module in marked.modules.items()}
    (tmp_path / "a").mkdir()
    replace(marked, modules=modules).save(tmp_path / "a")
    merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    assert "fingerprint" not in caplog.text
    merge(tiny_model("llama"), tmp_path / "a", tmp_path / "unmarked")
    assert "14 of 14 modules carry no fingerprint of the weight that they were trained on" in caplog.text
    caplog.clear()
    load_adapters(tmp_path / "a")
    assert "14 of 14 modules carry no fingerprint" in caplog.text
