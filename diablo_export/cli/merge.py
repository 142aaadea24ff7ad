"""`diablo-export merge`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diablo_export.cli.options import (
    adapter_option,
    asymmetric_option,
    base_option,
    group_size_option,
    json_option,
    output_option,
    overwrite_option,
    precision_option,
    quantize_option,
    verbosity_options,
)
from diablo_export.cli.summary import print_summary


@click.command(short_help="Merge an adapter's blocks into the weights, float or quantized.")
@base_option
@adapter_option
@output_option
@quantize_option
@click.option(
    "--format", type=click.Choice(["onnx", "hf"]), help="What to write.  [default: onnx when quantizing, hf otherwise]"
)
@group_size_option
@asymmetric_option
@precision_option
@overwrite_option
@json_option
@verbosity_options
def command(
    model: str,
    adapter: Path,
    output: Path,
    quantize: str,
    format: str | None,
    group_size: int,
    asymmetric: bool,
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
        model, adapter, output, quantize=quantize, format=format, group_size=group_size, asymmetric=asymmetric,
        precision=precision,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
    else:
        print_summary(manifest, output)
