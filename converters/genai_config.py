"""onnxruntime-genai's configuration of a model folder: reading, writing, and the graph that it names."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

CONFIG = "genai_config.json"


def read(folder: Path) -> Any:
    """The configuration; None where there is none, or none that genai could read."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(folder: Path, config: Any) -> None:
    """Write it as genai's builder does."""
    (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def rename_graph(folder: Path, old: str, new: str) -> None:
    """Name the graph `new` where the folder's configuration names it `old`."""
    config = read(folder)
    renamed = _renamed(config, old, new)
    if renamed != config:
        write(folder, renamed)


def _renamed(value: Any, old: str, new: str) -> Any:
    """The same JSON with every `filename` that is `old`, in whatever folder, as `new`."""
    if isinstance(value, list):
        return [_renamed(each, old, new) for each in value]
    if not isinstance(value, dict):
        return value
    there = value.get("filename")
    renamed = {key: _renamed(each, old, new) for key, each in value.items()}
    if isinstance(there, str) and PurePosixPath(there).name == old:
        renamed["filename"] = new
    return renamed
