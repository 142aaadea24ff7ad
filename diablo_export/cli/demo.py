"""diablo-export demo: the whole road on a small model made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diablo_export.cli.options import overwrite_option, verbosity_options
from diablo_export.errors import CheckFailed, require, require_all

if TYPE_CHECKING:
    from diablo_export.converters.demo import Demo

_FIGURES = ("survival_gain", "survival_cosine")


@click.command()
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path("diablo-demo"), show_default=True, metavar="DIR",
    help="Folder for models, data, adapter and reports.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="A few training steps only: every stage runs, the texts make no sense.")
@overwrite_option
@verbosity_options
def command(output: Path, quick: bool, overwrite: bool) -> None:
    """Walk the whole road offline: make a small model, adapt it, merge into int4, export a branch, prove both.

    The model learns English prose from Python's manual, the adapter Python code from the standard library. Under two
    minutes on a laptop's CPU.

    \b
    Example:
      diablo-export demo --output demo
    """
    require_all("train", "torch", "transformers")
    require("onnxruntime", "cpu")
    from diablo_export.converters.demo import demo

    done = demo(output, quick, overwrite)
    _show(done)
    if not (done.passed or quick):
        raise CheckFailed(
            f"{output}: a parity check failed; see parity.json in {output / 'int4'} and {output / 'branch'}"
        )


def _show(done: Demo) -> None:
    """The three texts side by side, the figures, and where everything is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    titles = {"base": "base: English prose", "tuned": "tuned: with blocks", "int4": "int4: blocks merged"}
    texts = Table(
        title="On an empty page, with the same random numbers, they write",
        box=SIMPLE_HEAD,
        expand=True,
        title_justify="left",
    )
    for title in titles.values():
        texts.add_column(title, ratio=1, overflow="fold")
    texts.add_row(*(Text(done.texts[name]) for name in titles))
    console.print(texts)
    figures = Table(title="What is left of the fine-tune", box=SIMPLE_HEAD, title_justify="left")
    for title in ("", "survival gain", "survival cosine", "same first choice", "verdict"):
        figures.add_column(title, justify="left" if title in ("", "verdict") else "right")
    for name, folder in (("merged", "int4"), ("branch", "branch")):
        report: dict[str, Any] = done.parity[name]
        adapter = report["adapter"] or {}
        values = [adapter.get(figure) for figure in _FIGURES] + [report["top1_agreement"]]
        shown = ["–" if value is None else f"{value:.3f}" for value in values]
        figures.add_row(folder, *shown, report["verdict"])
    console.print(figures)
    before, after = done.eval_losses
    console.print(f"Loss on code that no one trained on: {before:.2f} without the blocks, {after:.2f} with them.")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in done.seconds.items())
    console.print(f"{sum(done.seconds.values()):.0f} s in all: {spent}.")
    console.print(f"Everything is in {done.output.resolve()}: base/, data/, adapter/, int4/, branch/.", soft_wrap=True)
