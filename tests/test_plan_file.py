"""plan.toml: read back as written, and refused with everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from diablo_export.adapter import Adapter
from diablo_export.converters.plan_file import Plan, adapter_mark, base_mark, check_plan, read_plan, write_plan
from diablo_export.errors import InputError

Get = Callable[..., Path]
PLAN = Plan("base", "adapter", "int4 in groups of 32, symmetric", "calibrated", {"a.q": "int4", 'b."k"': "branch"})
METHODS = ("auto", "calibrated")
ALLOWED = {"a.q": ("int4", "int8", "branch"), 'b."k"': ("int4", "branch")}


def test_written_and_read_back(tmp_path: Path) -> None:
    figures = {"a.q": {"bytes": 4096, "gain": 1.0, "cosine": math.nan, "nats": 1.2e-7}}
    write_plan(tmp_path / "plan.toml", PLAN, {"kl": 0.0, "holds": True, "text": 'a "quote"'}, figures)
    assert read_plan(tmp_path / "plan.toml") == PLAN
    text = (tmp_path / "plan.toml").read_text()
    assert '"a.q" = {choice = "int4", bytes = 4096, gain = 1.0, cosine = nan, nats = 1.2e-07}' in text
    check_plan("plan.toml", read_plan(tmp_path / "plan.toml"), PLAN, ALLOWED, METHODS)


def test_a_choice_alone_will_do(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.toml", PLAN, {}, {})
    text = (tmp_path / "plan.toml").read_text().replace('{choice = "int4"}', '"int8"')
    (tmp_path / "plan.toml").write_text(text)
    assert read_plan(tmp_path / "plan.toml").choices["a.q"] == "int8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [", "is no TOML"),
        ("a = 1", "format_version is None, this program reads 1"),
        ("format_version = 1", r"base is None, and must be a text; .*it has no table \[modules\]; make one with"),
        ('format_version = 1\n[modules]\n"a.q" = {bytes = 1}', "a.q: choice is None"),
    ],
)
def test_no_plan(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_plan(tmp_path / "plan.toml")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read .*--plan is auto, or the plan.toml of a merge"):
        read_plan(tmp_path / "plan.toml")


def test_everything_that_is_wrong_at_once() -> None:
    wrong = dataclasses.replace(
        PLAN, adapter="another", grid="float", method="guess", choices={"a.q": "int3", "c.v": "branch"}
    )
    with pytest.raises(InputError) as raised:
        check_plan("plan.toml", wrong, PLAN, ALLOWED, METHODS)
    for said in (
        "plan.toml: does not fit: it was made for another adapter: SHA-256 another…, this one's is adapter…",
        "it was made for weights that are float, and here they are int4 in groups of 32, symmetric",
        "method is 'guess'; it can be auto, calibrated",
        "c.v: the adapter has no such module",
        'b."k": is not in the plan',
        "a.q: choice is 'int3'; it can be int4, int8, branch",
    ):
        assert said in str(raised.value)
    with pytest.raises(InputError, match="it was made for another base: the adapted weights have other fingerprints"):
        check_plan("plan.toml", dataclasses.replace(PLAN, base="other"), PLAN, ALLOWED, METHODS)


def test_marks(tiny_adapter: Get, other_adapter: Get) -> None:
    one, other = Adapter.load(tiny_adapter("llama")), Adapter.load(tiny_adapter("qwen2"))
    assert base_mark(one) == base_mark(Adapter.load(tiny_adapter("llama"))) != base_mark(other)
    assert adapter_mark(one) != adapter_mark(Adapter.load(other_adapter("llama")))
