"""`diablo-export bench`: what a branch costs at run time, beside its base, LoRA and a merge."""

from __future__ import annotations

import json as json_format
import logging
from pathlib import Path
from typing import Any

import click

from diablo_export.cli.options import verbosity_options

_STDOUT = Path("-")
_WIDTH = 90


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", "-a", metavar="NAME", help="Which of OUT's adapters. Default: the first.")
@click.option("--merged", type=click.Path(path_type=Path), metavar="DIR", help="A merge of the same, to time as well. "
              "Default: the base stands for it, as it has the same graph.")  # fmt: skip
@click.option("--prefill", type=click.IntRange(1), multiple=True, metavar="TOKENS",
              help="Length of a prompt, or of a classifier's input. Can be repeated. Default: 128 and 512, or as many "
              "as the model can take.")  # fmt: skip
@click.option("--past", type=click.IntRange(0), default=64, show_default=True, metavar="TOKENS",
              help="In the KV cache when one more token is decoded.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(3), default=20, show_default=True, help="Turns of each variant.")
@click.option("--seconds", type=click.FloatRange(0), default=60, show_default=True,
              help="Begin no further round of a length after this time, but never fewer than three.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Of onnxruntime. Default: its choice. With 1, processor time "
              "is reported as well, which a busy machine does not blur.")  # fmt: skip
@click.option(
    "--provider", default="CPUExecutionProvider", show_default=True, help="Execution provider of onnxruntime."
)
@click.option("--only", multiple=True, metavar="VARIANT", help="Time this beside the base, not all; can be repeated.")
@click.option("--control", is_flag=True, help="Time the base twice, as base-again: how far apart equal sessions are.")
@click.option("--json", type=click.Path(path_type=Path), is_flag=False, flag_value=_STDOUT, metavar="[FILE]",
              help="Write the report here; without FILE, to standard output in place of the tables.")  # fmt: skip
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Draw the ratios here.")
@verbosity_options
def command(out: Path, json: Path | None, prefill: tuple[int, ...], **options: Any) -> None:
    """Time the branch export in OUT beside its own base: prompts, and decoding a token with a KV cache.

    \b
    base            the same graph without branches
    branch          with the adapter, as standard operators
    branch-kernels  with the kernel library, where there is one
    empty           the branch's graph without adapter; empty-kernels: with the kernel library
    lora            low-rank branches of as many parameters at the same places, as onnxruntime runs them;
                    empty-lora: without adapter
    merged          a merge, where --merged names one

    All take turns, and the figure is the median of the ratios of each round.

    \b
    Example:
      diablo-export bench branch --threads 1 --prefill 128 --png bench.png
    """
    from diablo_export.console import log
    from diablo_export.timing.bench import bench
    from diablo_export.timing.report import tables

    printed = json == _STDOUT
    report = bench(out, json=None if printed else json, prefill=prefill or None, **options)
    if printed:
        click.echo(json_format.dumps(report, indent=1))
    elif log.isEnabledFor(logging.INFO):
        from rich.console import Console

        console = Console(highlight=False)
        console.width = max(console.width, _WIDTH)  # a figure cut short is none
        console.print(tables(report))
