"""diablo-export train."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from diablo_export.cli.options import (
    data_option,
    device_option,
    eval_data_option,
    eval_fraction_option,
    grid_options,
    json_option,
    model_option,
    output_option,
    overwrite_option,
    recompute_option,
    step_options,
    task_option,
    verbosity_options,
)
from diablo_export.errors import require_all

_FILE = click.Path(path_type=Path)


@click.command("train", context_settings={"show_default": True})
@model_option
@data_option
@output_option
@task_option
@click.option(
    "--num-blocks", type=int,
    help="Blocks per module: weights / N are trained.  [default: 64, or as many as --init-adapter has]",
)  # fmt: skip
@click.option(
    "--target-modules",
    metavar="NAMES",
    callback=lambda ctx, option, value: value and [name.strip() for name in value.split(",")],
    help="Ends of module paths, or regular expressions for whole ones, with commas between; or all-linear. "
    "[default: q,k,v,up,down_proj where the model has them, else all-linear]",
)
@click.option("--lr", type=float, default=5e-4, help="Peak learning rate; small models and short runs want more.")
@step_options
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Of matrix products; blocks and optimizer are float32.",
)
@device_option
@recompute_option
@click.option(
    "--base-quantize", type=click.Choice(["none", "int8", "int4", "int2"]), default="none",
    help="Train beside the very weights that export and merge --quantize ship.",
)  # fmt: skip
@grid_options()
@click.option(
    "--on-grid", is_flag=True,
    help="Let the blocks move the codes of the quantized base: merging them into it is then exact.",
)  # fmt: skip
@click.option(
    "--init-adapter", type=_FILE, metavar="A",
    help="Begin at the blocks of an adapter for the same base, such as a float one that is to go onto the grid.",
)  # fmt: skip
@click.option(
    "--repair-base", is_flag=True,
    help="Begin at the blocks that take back most of what quantizing did to each layer's output, instead of zeros.",
)  # fmt: skip
@eval_data_option
@eval_fraction_option
@click.option("--eval-every", type=int, metavar="STEPS", help="[default: a tenth of the run]")
@click.option("--checkpoint-every", type=int, metavar="STEPS", help="[default: a tenth of the run, at least 25]")
@click.option("--seed", type=int, default=0)
@click.option("--resume", is_flag=True, help="Continue an unfinished run of the same settings.")
@overwrite_option
@click.option("--tensorboard", type=_FILE, metavar="DIR", help="Also write TensorBoard's event files there.")
@click.option(
    "--dry-run", is_flag=True, help="Train nothing: say what the run will take in parameters, memory, steps and time."
)
@json_option
@verbosity_options
def command(as_json: bool, **options: Any) -> None:
    """Train DiaBlo blocks on a frozen model.

    Data is JSON Lines of {"text"}, {"prompt", "completion"}, {"messages"} or {"text", "label"}, or a .txt with one
    document per blank-line paragraph. The adapter folder also gets training.jsonl and loss.png.

    \b
    Example:
      diablo-export train --model M --data train.jsonl --eval-fraction 0.1 \\
        --num-blocks 32 --lr 1e-3 --epochs 3 --output adapter
    """  # fmt: skip
    require_all("train", "torch", "transformers", "accelerate", "matplotlib")
    from diablo_export.trainer.train import train

    done = train(**options)
    if int(os.environ.get("RANK", "0")):
        return  # the first of several processes speaks for all
    report = vars(done) | {"output": str(done.output)}
    plan = report.pop("plan")
    if plan is not None:
        from diablo_export.trainer.plan import describe

        click.echo(json.dumps(plan) if as_json else describe(plan))
    elif as_json:
        click.echo(json.dumps(report))
