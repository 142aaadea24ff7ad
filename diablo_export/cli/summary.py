"""What commands say when they are done: what was written, where, how large, and what to do next."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from diablo_export.console import log

_MOST_FILES = 12
_SAID = {"branch": "with a branch", "merged": "merged", "kept": "kept as branches"}


def print_summary(manifest: Mapping[str, Any], output: Path) -> None:
    """Print a manifest as a few lines on standard output; nothing when asked to be quiet."""
    if not log.isEnabledFor(logging.INFO):
        return
    files = manifest["files"]
    total = sum(entry["bytes"] for entry in files.values())
    actions = Counter(entry["action"] for entry in manifest["modules"])
    what = ", ".join(f"{count} modules {_SAID.get(action, action)}" for action, count in actions.items())
    names = ", ".join(entry["name"] for entry in manifest["adapters"])
    click.echo(f"{output}: {_size(total)} in {len(files)} files; {what} from {names}")
    for name, entry in list(files.items())[:_MOST_FILES]:
        click.echo(f"  {name:<40} {_size(entry['bytes']):>10}")
    if len(files) > _MOST_FILES:
        click.echo(f"  … and {len(files) - _MOST_FILES} more")
    click.echo(f"made by: {manifest['exporter']} ({manifest['reason']})")


def print_next(*words: object) -> None:
    """Print the command to type next, quoted for a shell; nothing when asked to be quiet."""
    if log.isEnabledFor(logging.INFO):
        click.echo(f"next: diablo-export {shlex.join(map(str, words))}")


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
