"""`diablo-export quantize`."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from diablo_export.cli.options import (
    grid_options,
    json_option,
    model_option,
    output_option,
    overwrite_option,
    task_option,
    verbosity_options,
)
from diablo_export.cli.summary import print_next
from diablo_export.console import log
from diablo_export.errors import require_all


@click.command(context_settings={"show_default": True})
@model_option
@output_option
@click.option("--bits", type=click.Choice(["8", "4", "2"]), default="4", callback=lambda ctx, option, bits: int(bits))
@grid_options()
@click.option(
    "--method", type=click.Choice(["calibrated", "gptq", "refit", "rtn"]), default="calibrated",
    help="How codes are chosen: by the error of each layer's output on the text (calibrated, better; gptq, several "
    "times as fast), by that of the weights (refit), or each to the nearest (rtn).",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="DATA",
    help="Text that the layers' inputs are taken of, as for train; labels are not looked at.  [default: text that the "
    "model writes]",
)  # fmt: skip
@task_option
@click.option("--seed", type=int, default=0, help="Of text that is drawn.")
@overwrite_option
@json_option
@verbosity_options
def command(as_json: bool, **options: Any) -> None:
    """Quantize a float model, as a base to train on that ships as it is.

    The linear layers of the model's blocks are written in GPTQ's format, which train, merge, export and parity take as
    --model; embeddings, norms and the output head stay float. At 2 bits codes that are calibrated on text keep far
    more of a model than rounding does, as train's --base-quantize int2 rounds.

    \b
    Example:
      diablo-export quantize --model M --bits 2 --calibration train.jsonl --output base2
      diablo-export train --model base2 --data train.jsonl --output adapter
      diablo-export export --model base2 --adapter adapter --output branch
    """
    require_all("train", "torch", "transformers", "accelerate")
    from diablo_export.converters.quantize import quantize

    manifest = quantize(**options)
    if as_json:
        click.echo(json.dumps(manifest, indent=1))
    elif log.isEnabledFor(logging.INFO):
        _say(manifest, options["output"])


def _say(manifest: Mapping[str, Any], output: Path) -> None:
    counts, laid = Counter(entry["action"] for entry in manifest["modules"]), manifest["options"]
    kind = "a" if laid["asymmetric"] else ""
    click.echo(
        f"{output}: {counts['quantized']} of {counts.total()} layers in {manifest['quantize']}, {kind}symmetric groups "
        f"of {laid['group_size']}, {laid['method']} on {manifest['text']}"
    )
    loss = manifest["loss"]
    if loss["float"] is not None:
        click.echo(f"loss on text held back: {loss['float']:.4f}, quantized {loss['quantized']:.4f}")
    print_next("train", "--model", output, "--data", "train.jsonl", "--output", "adapter")
