"""diablo-export sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from diablo_export.cli.options import (
    data_option,
    device_option,
    eval_data_option,
    eval_fraction_option,
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

_Callback = Callable[[click.Context, click.Parameter, str], list[Any]]


def _several(kind: Callable[[str], Any], what: str) -> _Callback:
    """A callback for values with commas between."""

    def split(ctx: click.Context, option: click.Parameter, value: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in value.split(",")]
        except ValueError:
            raise click.BadParameter(f"{value!r} is not {what} with commas between") from None

    return split


@click.command("sweep", context_settings={"show_default": True})
@model_option
@data_option
@output_option
@click.option("--methods", default="diablo,lora,full", callback=_several(str, "names"), metavar="NAMES",
              help="Of diablo, lora, dora, full, permuted, random-block, smt, s2ft, with commas between.")  # fmt: skip
@click.option("--lr", default="1e-4,3e-4,1e-3,3e-3,1e-2", callback=_several(float, "numbers"), metavar="RATES",
              help="Peak learning rates; small models and short runs want more.")  # fmt: skip
@click.option("--num-blocks", default="64", callback=_several(int, "whole numbers"), metavar="COUNTS",
              help="Blocks per module: weights / N are trained. LoRA gets the rank of as many parameters.")  # fmt: skip
@click.option("--target-modules", multiple=True, metavar="NAMES",
              callback=lambda ctx, option, value: [[name.strip() for name in names.split(",")] for names in value],
              help="A set of targets, as for train; give it again for each further set.")  # fmt: skip
@click.option("--seeds", default="0", callback=_several(int, "whole numbers"), metavar="SEEDS", help="A run each.")
@task_option
@step_options
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
              help="Of matrix products; what is trained and the optimizer are float32.")  # fmt: skip
@device_option
@recompute_option
@eval_data_option
@eval_fraction_option
@click.option("--jobs", type=int, help="Runs at a time, a process each.  [default: one for each GPU]")
@click.option("--resume", is_flag=True, help="Go on with an unfinished sweep, or widen a finished one.")
@overwrite_option
@json_option
@verbosity_options
def command(as_json: bool, **options: Any) -> None:
    """Compare methods, learning rates, block counts, targets and seeds in the same training loop.

    Every run has the same data and number of steps, and is judged on the same held-out data. The output folder gets
    results.jsonl, a line for each run; table.md; and sweep.png, the held-out figure against the learning rate. A run
    that diverges is a result. What is finished when a sweep is stopped is kept for --resume.

    \b
    Example:
      diablo-export sweep --model M --data train.jsonl --eval-fraction 0.1 --methods diablo,lora,full \\
        --lr 1e-4,3e-4,1e-3,3e-3 --num-blocks 32,64 --seeds 0,1,2 --output sweep
    """  # fmt: skip
    require_all("train", "torch", "transformers", "accelerate", "matplotlib")
    from diablo_export.trainer.sweep import sweep
    from diablo_export.trainer.sweep_report import table

    results = sweep(**options)
    click.echo(json.dumps(results) if as_json else table(results), nl=as_json)
