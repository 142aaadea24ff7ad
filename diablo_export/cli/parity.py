"""`diablo-export parity`: prove that what was exported is what was trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from diablo_export.cli.options import verbosity_options


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", "-m", metavar="M", help="Base model, where it is not at the place that OUT's manifest names.")
@click.option(
    "--adapter", "-a", multiple=True, metavar="[NAME=]PATH",
    help="Adapter folder in place of the one that OUT's manifest names, or a NAME to check that one only. "
    "Default: all adapters in OUT, one after the other.",
)  # fmt: skip
@click.option("--data", "-d", type=click.Path(path_type=Path), help="Compare on this JSON Lines or .txt file. "
              "Default: built-in prompts.")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), metavar="N", help="At most N examples of it.")
@click.option("--max-tokens", type=click.IntRange(1), default=8192, show_default=True, help="At most so many tokens.")
@click.option("--steps", type=click.IntRange(1), default=32, show_default=True, help="Tokens to decode per prompt.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="Hold a figure to another limit, or one more; "
              "a wrong NAME lists them all. Can be repeated.")  # fmt: skip
@click.option("--limits", type=click.Path(path_type=Path), metavar="FILE", help="A parity.toml: limits for all exports "
              "and by precision. --limit goes before it.")  # fmt: skip
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="The last release's parity.json: "
              "no figure may be worse than there.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of examples.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and onnxruntime.")
@click.option("--json", type=click.Path(path_type=Path), metavar="FILE", help="Write the report here, too.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the checks as JUnit XML.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as one HTML page.")
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Write it for a pull request.")
@click.option("--certificate", is_flag=True, help="If every check held, store golden rows, limits and hashes in OUT "
              "for `diablo-export verify`.")  # fmt: skip
@click.option("--modules/--no-modules", default=True, show_default=True, help="Compare every linear module, too, on at "
              "most 256 tokens, and name the first that diverges.")  # fmt: skip
@click.option("--exported-base", type=click.Path(path_type=Path), metavar="PATH", help="For an export of another "
              "program: what it makes of the base alone, an ONNX file or folder.")  # fmt: skip
@verbosity_options
def command(out: Path, **options: Any) -> None:
    """Compare the exported model in OUT with the tuned model in torch.

    OUT may also be an ONNX file or folder that another program made, with a LoRA, DoRA or DiaBlo adapter from PEFT;
    then give --model and --adapter.

    Whole sequences and decoding step by step, the adapter on and off, every file's hash. Writes OUT/parity.json.
    Exit code 0: every check held; 1: one failed; 2: bad input.

    \b
    Example:
      diablo-export parity int4 --data test.jsonl --limit kl.mean=0.05 --junit parity.xml
      diablo-export parity model.onnx --model M --adapter lora --exported-base base.onnx
    """
    from diablo_export.console import log
    from diablo_export.measure.parity import parity
    from diablo_export.measure.report import require_pass, table

    report = parity(out, **options)
    if log.isEnabledFor(logging.INFO):
        from rich.console import Console

        Console(highlight=False).print(table(report))
    require_pass(report, out)
