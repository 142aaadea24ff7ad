"""`diablo-export patch create|apply|revert|info`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from diablo_export import patch as patches
from diablo_export.cli.options import json_option, overwrite_option, verbosity_options
from diablo_export.console import log
from diablo_export.patch_header import lines

_path = click.Path(path_type=Path)
_patch_argument = click.argument("patch", type=_path)
_turned_option = click.option(
    "--output", "-o", metavar="DIR", type=_path, help="Folder to write.  [default: changed in place]"
)


@click.group()
def command() -> None:
    """Ship a merge as a patch: a small file with what it changed, checked by hash, reversible.

    \b
    Example:
      diablo-export patch create base merged --output update.patch
      diablo-export patch apply base update.patch
    """


@command.command()
@click.argument("base", type=_path)
@click.argument("merged", type=_path)
@click.option("--output", "-o", required=True, metavar="FILE", type=_path, help="Patch file to write.")
@overwrite_option
@json_option
@verbosity_options
def create(as_json: bool, **options: Any) -> None:
    """Write what must change in BASE, a folder, for it to be MERGED, byte for byte.

    \b
    Example:
      diablo-export patch create base merged --output update.patch
    """
    _report(patches.create(**options), options["output"], as_json)


@command.command()
@click.argument("base", type=_path)
@_patch_argument
@_turned_option
@overwrite_option
@json_option
@verbosity_options
def apply(as_json: bool, **options: Any) -> None:
    """Turn BASE into the merged model that PATCH was made from.

    The new folder is written beside the old one and takes its name when it is whole. A BASE that is another model is
    refused; one that is the merged model already stays as it is. Where only numpy is installed:
    python -m diablo_export.patch apply BASE PATCH

    \b
    Example:
      diablo-export patch apply base update.patch --output merged
    """
    _turn(patches.apply, options, as_json)


@command.command()
@click.argument("merged", type=_path)
@_patch_argument
@_turned_option
@overwrite_option
@json_option
@verbosity_options
def revert(as_json: bool, **options: Any) -> None:
    """Turn MERGED, or a base that PATCH was applied to, into the base again.

    \b
    Example:
      diablo-export patch revert merged update.patch
    """
    _turn(patches.revert, options, as_json)


@command.command()
@_patch_argument
@json_option
@verbosity_options
def info(patch: Path, as_json: bool) -> None:
    """Say what PATCH changes, and how large it is.

    \b
    Example:
      diablo-export patch info update.patch
    """
    _report(patches.info(patch), patch, as_json)


def _turn(verb: Callable[..., dict[str, Any]], options: dict[str, Any], as_json: bool) -> None:
    report = verb(**options)
    _report(report, options["patch"], as_json)
    if not as_json and log.isEnabledFor(logging.INFO) and report["written"]:
        place = options["output"] or options.get("base") or options["merged"]
        click.echo(f"changed {', '.join(report['written'])} in {place}")  # one that the other model has not is gone


def _report(report: dict[str, Any], patch: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif log.isEnabledFor(logging.INFO):
        first, *rest = lines(report)
        click.echo("\n".join([f"{patch}: {first}", *rest]))
