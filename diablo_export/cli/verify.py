"""`diablo-export verify`: check a certified export again where it will run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diablo_export.cli.options import json_option, verbosity_options


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--provider", metavar="NAME", help="Execution provider, such as CPU or CUDA. Default: the best there is.")
@click.option("--threads", type=click.IntRange(1), help="Threads of onnxruntime.")
@json_option
@verbosity_options
def command(out: Path, provider: str | None, threads: int | None, as_json: bool) -> None:
    """Check the export in OUT against its certificate, with onnxruntime and numpy alone.

    Every file's hash, and what the model gives for the golden inputs that diablo-export parity OUT --certificate
    stored. Exit code 0: it is what was certified; 1: it is not; 2: bad input. Where only onnxruntime and numpy are
    installed: python -m diablo_export.measure.verify OUT

    \b
    Example:
      diablo-export verify out/int4 --provider CUDA
    """
    from diablo_export.measure import verify as verifying

    report = verifying.verify(out, provider=provider, threads=threads)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        click.echo("\n".join(verifying.lines(report)))
    verifying.require_pass(report, out)
