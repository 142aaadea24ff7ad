"""diablo-export doctor: what this machine has, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from diablo_export.cli.options import json_option, verbosity_options
from diablo_export.errors import CheckFailed

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {"broken": "[bold red]broken[/]", "conflict": "[yellow]conflict[/]", "missing": "[cyan]missing[/]"}


@click.command()
@json_option
@verbosity_options
def command(as_json: bool) -> None:
    """Say what this machine has: hardware, packages, runtimes, kernels; what is broken or missing, and how to get it.

    Exit code 1 when something that is installed does not work, such as a kernel library that gives wrong numbers.

    \b
    Example:
      diablo-export doctor
      diablo-export doctor --json
    """
    from diablo_export.diagnosis import doctor

    report = doctor()
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        show(report)
    broken = [problem["what"] for problem in report["problems"] if problem["kind"] == "broken"]
    if broken:
        raise CheckFailed("; ".join(broken))


def show(report: Mapping[str, Any]) -> None:
    """Print a report, a group after the other, as wide as the terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    _facts(console, "Machine", _machine(report))
    _packages(console, report["packages"])
    _facts(console, "ONNX Runtime", _runtime(report["onnxruntime"]))
    _facts(console, "Kernels", _kernels(report["kernels"]))
    _facts(console, "Programs", [(tool["name"], _tool(tool)) for tool in report["tools"]])
    _problems(console, report["problems"])


def _machine(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    hardware, python = report["hardware"], report["python"]
    yield "system", ", ".join(filter(None, (hardware["system"], hardware["architecture"], hardware["c_library"])))
    yield "processor", f"{hardware['processor'] or 'unknown'}, {hardware['cores']} cores"
    yield "instructions", ", ".join(hardware["instructions"] or ["unknown"])
    yield "memory", f"{_size(hardware['memory'])}, {_size(hardware['memory_free'])} free"
    yield "disk", f"{_size(hardware['disk_free'])} free in {hardware['disk']}"
    for gpu in report["gpus"]:
        yield "GPU", f"{gpu['name']}, {_size(gpu['memory'])}, driver {gpu['driver']}, compute {gpu['compute']}"
    if not report["gpus"]:
        yield "GPU", "none seen (nvidia-smi)"
    where = "in a virtual environment" if python["virtual_environment"] else "not in a virtual environment"
    yield "Python", f"{python['version']}, {where}, {python['executable']}"
    yield "diablo-export", report["diablo-export"]


def _runtime(runtime: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "version", runtime["version"] or "none"
    if runtime["providers"]:
        unusable = [name for name in runtime["providers"] if name not in runtime["usable"]]
        names = [f"{name} (cannot be used)" if name in unusable else name for name in runtime["providers"]]
        yield "providers", ", ".join(names)
    if runtime["body_error"] is not None:
        yield "branch", f"as standard operators, largest error {runtime['body_error']:.1g}"
    if runtime["error"]:
        yield "error", runtime["error"]


def _kernels(kernels: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "library", kernels["library"] or f"none: {kernels['reason'] or 'not looked for'}"
    if kernels["version"]:
        cuda = "with CUDA" if kernels["cuda"] else "without CUDA"
        yield "version", f"{kernels['version']}, runs with {kernels['isa']}, {cuda}"
    for provider, error in (kernels["max_error"] or {}).items():
        yield "branch", f"{provider}, largest error {error:.1g}"
    if kernels["error"]:
        yield "error", kernels["error"]


def _tool(tool: Mapping[str, Any]) -> str:
    found = f"{tool['version'] or 'of unknown version'}, {tool['path']}" if tool["path"] else "none"
    return f"{found} ({tool['for']})"


def _facts(console: Console, title: str, facts: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=15, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(f"  {name}", escape(value))
    console.print(f"[bold]{title}[/]")
    console.print(table)


def _packages(console: Console, packages: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(overflow="fold")
    for each in packages:
        minimum = f"≥ {each['minimum']}" if each["minimum"] else ""
        extras = ", ".join(f"\\[{extra}]" for extra in each["extras"] or [])
        table.add_row(f"  {each['name']}", each["version"] or "[dim]none[/]", minimum, extras)
    console.print("[bold]Packages[/]")
    console.print(table if packages else "  unknown: this is a checkout that is not installed")


def _problems(console: Console, problems: Sequence[Mapping[str, str]]) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    if not problems:
        console.print("[bold green]Nothing is broken or missing.[/]")
        return
    console.print("[bold]To do[/]")
    for problem in problems:
        console.print(Padding(f"{_MARKS[problem['kind']]}: {escape(problem['what'])}", (0, 0, 0, 2)))
        # unwrapped, so that a command can be copied whole
        console.print(f"    {escape(problem['fix'])}", soft_wrap=True)


def _size(size: int | None) -> str:
    return f"{size / 1e9:.1f} GB" if size is not None else "unknown"
