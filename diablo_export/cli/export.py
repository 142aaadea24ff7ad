"""`diablo-export export`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diablo_export.cli.options import json_option, output_option, overwrite_option, verbosity_options
from diablo_export.cli.summary import print_summary


@click.command(short_help="Export ONNX that keeps the blocks as a swappable branch.")
@click.option("--model", "-m", required=True, metavar="M", help="Hugging Face model folder or id, or an ONNX model.")
@click.option(
    "--adapter", "-a", required=True, multiple=True, metavar="[NAME=]A",
    help="DiaBlo adapter folder; give several to swap between them. Its NAME is the folder's unless said.",
)  # fmt: skip
@output_option
@click.option(
    "--quantize", type=click.Choice(["none", "int8", "int4"]), default="none", show_default=True,
    help="Grid of the base's linear layers; the blocks stay float.",
)  # fmt: skip
@click.option(
    "--group-size", type=click.Choice(["16", "32", "64", "128", "256"]), default="32", show_default=True,
    help="Input positions that share a scale, when quantizing.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Of the blocks and of everything that is not quantized.",
)  # fmt: skip
@overwrite_option
@json_option
@verbosity_options
def command(
    model: str,
    adapter: tuple[str, ...],
    output: Path,
    quantize: str,
    group_size: str,
    precision: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export an ONNX model whose blocks can be fed and swapped while it runs; unfed it is the base.

    \b
    Example:
      diablo-export export --model M --adapter bard=adapter --adapter tales=other --quantize int4 --output branch
    """
    from diablo_export.converters.export import export

    manifest = export(
        model, adapter, output, quantize=quantize, group_size=int(group_size), precision=precision,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
    else:
        print_summary(manifest, output)
