"""`diablo-export export`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diablo_export.cli.options import (
    base_option,
    grid_options,
    json_option,
    output_option,
    overwrite_option,
    precision_option,
    quantize_option,
    verbosity_options,
)
from diablo_export.cli.summary import print_next, print_summary


@click.command(short_help="Export ONNX that keeps the blocks as a swappable branch.")
@base_option
@click.option(
    "--adapter", "-a", required=True, multiple=True, metavar="[NAME=]A",
    help="DiaBlo adapter folder; give several to swap between them. Its NAME is the folder's unless said.",
)  # fmt: skip
@output_option
@quantize_option
@grid_options("as trained, else ")
@precision_option
@click.option(
    "--block-dtype", type=click.Choice(["fp32", "fp16", "int8"]),
    help="How blocks are stored and fed: int8 is a quarter of fp32's bytes. Without it as the graph's own floats.",
)  # fmt: skip
@click.option(
    "--for", "for_", type=click.Choice(["ort", "web"]), default="ort", show_default=True,
    help="What will run it. web: onnxruntime-web and onnxruntime-node; blocks are inputs of every run, adapters "
    "safetensors files.",
)  # fmt: skip
@click.option(
    "--custom-ops-library", metavar="PATH|auto",
    help="Kernel library to put into the folder and name in genai_config.json, for onnxruntime-genai; auto: the "
    "installed one. Without it no file of the export names a library.",
)  # fmt: skip
@click.option(
    "--add", is_flag=True,
    help="Put the adapters into --output, an export of the same base, and leave the rest of it alone.",
)  # fmt: skip
@overwrite_option
@json_option
@verbosity_options
def command(
    model: str,
    adapter: tuple[str, ...],
    output: Path,
    quantize: str,
    group_size: int | None,
    asymmetric: bool | None,
    precision: str,
    block_dtype: str | None,
    for_: str,
    custom_ops_library: str | None,
    add: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export an ONNX model whose blocks can be fed and swapped while it runs; unfed it is the base.

    \b
    Example:
      diablo-export export --model M --adapter bard=adapter --adapter tales=other --quantize int4 --output branch
      diablo-export export --model M --adapter later=third --output branch --add
    """
    from diablo_export.converters.export import export

    manifest = export(
        model, adapter, output, quantize=quantize, group_size=group_size, asymmetric=asymmetric, precision=precision,
        block_dtype=block_dtype, for_=for_, custom_ops_library=custom_ops_library, add=add,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
    else:
        print_summary(manifest, output)
        print_next("parity", output, "--data", "test.jsonl")
