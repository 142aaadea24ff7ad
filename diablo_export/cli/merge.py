"""`diablo-export merge`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diablo_export.cli.options import (
    adapter_option,
    json_option,
    model_option,
    output_option,
    overwrite_option,
    verbosity_options,
)
from diablo_export.cli.summary import print_summary


@click.command(short_help="Merge an adapter's blocks into the weights, float or quantized.")
@model_option
@adapter_option
@output_option
@click.option(
    "--quantize", type=click.Choice(["none", "int8", "int4"]), default="none", show_default=True,
    help="Grid of the linear layers' weights.",
)  # fmt: skip
@click.option(
    "--format", type=click.Choice(["onnx", "hf"]), help="What to write.  [default: onnx when quantizing, hf otherwise]"
)
@click.option(
    "--group-size", type=click.Choice(["16", "32", "64", "128", "256"]), default="32", show_default=True,
    help="Input positions that share a scale, when quantizing.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Of what an ONNX file holds unquantized.",
)  # fmt: skip
@overwrite_option
@json_option
@verbosity_options
def command(
    model: str,
    adapter: Path,
    output: Path,
    quantize: str,
    format: str | None,
    group_size: str,
    precision: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge an adapter's blocks into its model's weights.

    \b
    Example:
      diablo-export merge --model M --adapter adapter --quantize int4 --output int4
    """
    from diablo_export.converters.merge import merge

    manifest = merge(
        model, adapter, output, quantize=quantize, format=format, group_size=int(group_size), precision=precision,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
    else:
        print_summary(manifest, output)
