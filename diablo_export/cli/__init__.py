"""The command line: one module per command, loaded when it is called; errors become messages here and nowhere else."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from typing import Any

import click

from diablo_export import __version__
from diablo_export.console import log, print_what_fits, set_verbosity
from diablo_export.errors import CheckFailed, InputError

# command → its one-line help; the module is diablo_export.cli.<command> with a click command `command`
COMMANDS = {
    "train": "Train DiaBlo blocks on a model.",
    "sweep": "Compare methods, learning rates and block counts in one loop.",
    "quantize": "Quantize a float model to 8, 4 or 2 bits as a base to train on.",
    "merge": "Merge an adapter's blocks into the weights, float or quantized.",
    "export": "Export ONNX that keeps the blocks as a swappable branch.",
    "parity": "Prove that what was exported is what was trained.",
    "verify": "Check a certified export again, on the device, without torch.",
    "bench": "Time what a branch costs, beside its base, LoRA and a merge.",
    "patch": "Ship a merge as a small, reversible patch of its base.",
    "inspect": "Say what an adapter, a checkpoint or an ONNX file is.",
    "convert": "Convert the paper's adapter.chkpt to this format and back.",
    "doctor": "Say what this machine has, what is broken or missing, and how to get it.",
    "demo": "Walk the whole road on a small model made on the spot.",
}


class Commands(click.Group):
    """A group that imports a command's module only when that command is called."""

    def main(self, *arguments: Any, **more: Any) -> Any:
        """Run the program; no colours where NO_COLOR is set."""
        print_what_fits()
        if os.environ.get("NO_COLOR"):
            more.setdefault("color", False)
        return super().main(*arguments, **more)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the road, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import diablo_export.cli.<name> and return its command."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"diablo_export.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them: --help answers at once."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; the package's own errors become one message and an exit code."""
        set_verbosity(logging.INFO)
        try:
            return super().invoke(ctx)
        except InputError as error:
            _stop(ctx, str(error), 2)
        except CheckFailed as error:
            _stop(ctx, str(error), 1)
        except OSError as error:  # not to be read, written or reached; a pipe that was closed is click's
            if error.errno in (None, errno.EPIPE):
                raise
            log.debug("", exc_info=True)
            _stop(ctx, f"{error.filename or 'what is printed'}: {error.strerror}", 2)
        except KeyboardInterrupt:
            _stop(ctx, "interrupted; nothing was left half-written", 130)


def _stop(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    ctx.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="diablo-export")
def main() -> None:
    """Train DiaBlo fine-tunes, merge them into int4, export them as ONNX branches, and prove that they survived.

    \b
    Example:
      diablo-export train  --model M --data train.jsonl --output adapter
      diablo-export merge  --model M --adapter adapter --quantize int4 --output int4
      diablo-export parity int4 --data test.jsonl
    """


if __name__ == "__main__":
    sys.exit(main())
