"""Options that several commands share, spelled once."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from diablo_export.console import set_verbosity

F = Callable[..., Any]


def _only(ctx: click.Context, param: click.Parameter, given: tuple[Path, ...]) -> Path:
    """Callback of an option that is given once: click would take the last and say nothing of the others."""
    if len(given) > 1:
        names = ", ".join(map(str, given))
        raise click.BadParameter(
            f"{len(given)} were given ({names}), and one is merged; diablo-export export takes several, "
            "diablo_export.runtime.combine adds them up"
        )
    return given[0]


model_option = click.option("--model", "-m", required=True, metavar="M", help="Hugging Face model folder or id.")
base_option = click.option(
    "--model", "-m", required=True, metavar="M", help="Hugging Face model folder or id, or an ONNX file or folder."
)
adapter_option = click.option(
    "--adapter", "-a", required=True, multiple=True, callback=_only, metavar="A", type=click.Path(path_type=Path),
    help="DiaBlo adapter folder.",
)  # fmt: skip
output_option = click.option(
    "--output", "-o", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write."
)
quantize_option = click.option(
    "--quantize", type=click.Choice(["none", "int8", "int4", "int2"]), default="none", show_default=True,
    help="Grid of the weights of the model's linear layers.",
)  # fmt: skip
precision_option = click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Of what an ONNX model holds unquantized.",
)  # fmt: skip
data_option = click.option(
    "--data", "-d", required=True, type=click.Path(path_type=Path), metavar="D", help="Training data: .jsonl or .txt."
)
task_option = click.option("--task", type=click.Choice(["causal-lm", "text-classification"]), default="causal-lm")
eval_data_option = click.option("--eval-data", type=click.Path(path_type=Path), metavar="D", help="Held-out data.")
eval_fraction_option = click.option("--eval-fraction", type=float, default=0.0, help="Hold out this share of --data.")
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
recompute_option = click.option("--gradient-checkpointing", is_flag=True, help="Less memory, a third more time.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")


def grid_options(trained: str = "") -> Callable[[F], F]:
    """--group-size and --asymmetric; `trained` is what their defaults heed before the task."""

    def add(function: F) -> F:
        function = click.option(
            "--asymmetric/--symmetric", default=None,
            help="A zero point for each group, when quantizing: nearer to the weights, a little larger. Default: "
            f"{trained}for classifiers.",
        )(function)  # fmt: skip
        return click.option(
            "--group-size", type=int, metavar="16|32|64|128|256",
            help=f"Input positions that share a scale, when quantizing. Default: {trained}32; for classifiers 16.",
        )(function)  # fmt: skip

    return add


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Callback of an option: bytes, from a number with kB, MB or GB behind it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text or "0")
    if found is None or found[2].lower() not in _UNITS:
        raise click.BadParameter(f"{text!r} is no size; write bytes, or a number with kB, MB or GB, such as 300MB")
    return None if text is None else int(float(found[1]) * _UNITS[found[2].lower()])


def verbosity_options(function: F) -> F:
    """-q and -v set what is said on standard error; the command itself does not see them."""

    def set_level(ctx: click.Context, param: click.Parameter, level: int | None) -> None:
        if level is not None:
            set_verbosity(level)

    function = click.option(
        "-v", "--verbose", "loud", flag_value=logging.DEBUG, type=int, expose_value=False, callback=set_level,
        help="Say more.",
    )(function)  # fmt: skip
    return click.option(
        "-q", "--quiet", "low", flag_value=logging.ERROR, type=int, expose_value=False, callback=set_level,
        help="Say only what went wrong.",
    )(function)  # fmt: skip


_STEP_OPTIONS = (
    click.option("--epochs", type=float, default=1.0, help="Passes over the data."),
    click.option("--max-steps", type=int, help="Steps in all; wins over --epochs."),
    click.option("--batch-size", type=int, default=16),
    click.option("--grad-accumulation", type=int, default=1, help="Batches per step."),
    click.option("--max-length", type=int, help="Tokens per item or packed piece.  [default: 512 at most]"),
    click.option("--schedule", type=click.Choice(["linear", "cosine", "constant"]), default="linear"),
    click.option("--warmup-steps", type=int, help="Steps of rising learning rate, from 0.  [default: a twentieth]"),
    click.option("--weight-decay", type=float, default=0.0),
    click.option("--clip", type=float, default=1.0, help="Largest norm of the gradient; 0 for none."),
)


def step_options(function: F) -> F:
    """What a training run's steps are made of, the same for `train` and `sweep`."""
    for option in reversed(_STEP_OPTIONS):
        function = option(function)
    return function
