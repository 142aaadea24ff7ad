"""The names that other programs may rely on."""

from __future__ import annotations

import inspect
import re

import click
import pytest

import diablo_export
from diablo_export.cli import COMMANDS


def test_all_is_pinned() -> None:
    assert diablo_export.__all__ == [
        "__version__", "bench", "convert", "demo", "doctor", "export", "inspect", "merge", "parity", "patch",
        "quantize", "sweep", "train", "verify",
    ]  # fmt: skip
    assert dir(diablo_export) == diablo_export.__all__


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", diablo_export.__version__)


def test_one_function_per_command() -> None:
    assert set(COMMANDS) == set(diablo_export.__all__) - {"__version__"}


def commands() -> dict[str, tuple[click.Command, object]]:
    """Every command and subcommand with the function that it calls, by the name in Python."""
    found: dict[str, tuple[click.Command, object]] = {}
    for verb in COMMANDS:
        command = diablo_export.cli.Commands().get_command(None, verb)  # type: ignore[attr-defined, arg-type]
        verbs = getattr(diablo_export, verb)
        if isinstance(command, click.Group):
            found |= {f"{verb}.{name}": (one, getattr(verbs, name)) for name, one in command.commands.items()}
        else:
            found[verb] = command, verbs
    return found


@pytest.mark.parametrize("verb", sorted(commands()))
def test_verbs_take_what_their_commands_take(verb: str) -> None:
    command, function = commands()[verb]
    assert inspect.isfunction(function) and inspect.getdoc(function)
    options = {parameter.name for parameter in command.params if parameter.expose_value} - {"as_json"}
    assert options == set(inspect.signature(function).parameters)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = diablo_export.nothing
