"""diablo-export inspect: what a file or folder is, as a table or as JSON."""

from __future__ import annotations

from typing import Any

import click

from diablo_export.cli.options import json_option, verbosity_options
from diablo_export.errors import CheckFailed

_JSON_ONLY = ("why",)  # too wide for a terminal


@click.command()
@click.argument("path")
@click.option("--model", "-m", metavar="M", help="For an adapter: the base to compare it with.")
@click.option("--adapter", "-a", metavar="A", help="For a model: the adapter to compare it with.")
@json_option
@verbosity_options
def command(path: str, model: str | None, adapter: str | None, as_json: bool) -> None:
    """Say what PATH is: adapter, Hugging Face checkpoint, ONNX model, output folder, patch or adapter.chkpt.

    With the other half, --model or --adapter, also whether the two fit, and where they do not: exit code 1.

    \b
    Example:
      diablo-export inspect adapter --model M
      diablo-export inspect M
      diablo-export inspect out/int4 --json
    """
    from diablo_export.converters.inspection import inspect, to_json

    report = inspect(path, model, adapter)
    if as_json:
        click.echo(to_json(report))
    else:
        show(report)
    if not report.get("fits", True):
        raise CheckFailed(f"{path}: does not fit {report['compared_with']}")


def show(report: dict[str, Any]) -> None:
    """Print a report: its plain entries as a list, its lists of entries as a table each."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    tables = {
        key: rows for key, rows in report.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    }
    for key, value in report.items():
        if key not in tables and value not in (None, [], {}, ""):
            facts.add_row(_words(key), escape(text(value)))
    console.print(facts)
    for key, rows in tables.items():
        table = Table(title=_words(key), title_justify="left", header_style="bold", box=SIMPLE_HEAD)
        columns = [column for column in rows[0] if column not in _JSON_ONLY]
        for column in columns:
            right = isinstance(rows[0][column], int)
            table.add_column(_words(column), justify="right" if right else "left", overflow="fold")
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(*(escape(text(row.get(column))) for column in columns))
        console.print(table)


def text(value: Any) -> str:
    """A value as people read it: thousands separated, lists and dicts on one line, yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(each)}" for key, each in value.items())
    return ", ".join(text(each) for each in value) if isinstance(value, list) else str("" if value is None else value)


def _words(key: str) -> str:
    return key.replace("_features", "").replace("_", " ")
