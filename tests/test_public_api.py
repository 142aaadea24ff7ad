"""The names that other programs may rely on."""

from __future__ import annotations

import inspect
import re

import pytest

import diablo_export
from diablo_export.cli import COMMANDS


def test_all_is_pinned() -> None:
    assert diablo_export.__all__ == [
        "__version__", "bench", "convert", "demo", "doctor", "export", "inspect", "merge", "parity", "train", "verify",
    ]  # fmt: skip
    assert dir(diablo_export) == diablo_export.__all__


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", diablo_export.__version__)


def test_one_function_per_command() -> None:
    assert set(COMMANDS) == set(diablo_export.__all__) - {"__version__"}


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_verbs_take_what_their_commands_take(verb: str) -> None:
    function = getattr(diablo_export, verb)
    assert inspect.isfunction(function) and inspect.getdoc(function)
    command = diablo_export.cli.Commands().get_command(None, verb)  # type: ignore[attr-defined, arg-type]
    assert command is not None
    options = {parameter.name for parameter in command.params if parameter.expose_value} - {"as_json"}
    assert options == set(inspect.signature(function).parameters)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = diablo_export.nothing
