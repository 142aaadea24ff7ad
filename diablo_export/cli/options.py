"""Options that several commands share, spelled once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from diablo_export.console import set_verbosity

F = Callable[..., Any]

model_option = click.option("--model", "-m", required=True, metavar="M", help="Hugging Face model folder or id.")
base_option = click.option(
    "--model", "-m", required=True, metavar="M", help="Hugging Face model folder or id, or an ONNX file or folder."
)
adapter_option = click.option(
    "--adapter", "-a", required=True, metavar="A", type=click.Path(path_type=Path), help="DiaBlo adapter folder."
)
output_option = click.option(
    "--output", "-o", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write."
)
quantize_option = click.option(
    "--quantize", type=click.Choice(["none", "int8", "int4", "int2"]), default="none", show_default=True,
    help="Grid of the weights of the model's linear layers.",
)  # fmt: skip
asymmetric_option = click.option(
    "--asymmetric/--symmetric", default=None,
    help="A zero point for each group, when quantizing: nearer to the weights, a little larger. Default: as trained, "
    "else for classifiers.",
)  # fmt: skip
group_size_option = click.option(
    "--group-size", type=int, metavar="16|32|64|128|256",
    help="Input positions that share a scale, when quantizing. Default: as trained, else 32; for classifiers 16.",
)  # fmt: skip
precision_option = click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Of what an ONNX model holds unquantized.",
)  # fmt: skip
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")


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
