"""diablo-export convert: the paper's adapter.chkpt to this format and back."""

from __future__ import annotations

from pathlib import Path

import click

from diablo_export.cli.options import model_option, overwrite_option, verbosity_options


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Adapter folder, or .chkpt file, to write."
)
@overwrite_option
@verbosity_options
def command(file: Path, model: str, output: Path, overwrite: bool) -> None:
    """Convert the paper's adapter.chkpt FILE to an adapter folder, or an adapter folder FILE back.

    Sizes and targets are recovered from the file and checked against the model. A pickle that holds anything but
    tensors is refused, never run.

    \b
    Example:
      diablo-export convert adapter.chkpt --model M --output adapter
      diablo-export convert adapter --model M --output adapter.chkpt
    """
    from diablo_export.converters.diablo_chkpt import convert

    done = convert(file, model, output, overwrite)
    click.echo(
        f"{done.output}: {len(done.modules)} modules ({', '.join(done.target_modules)}), num_blocks {done.num_blocks}"
    )
