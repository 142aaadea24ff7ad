"""Put the kernel library into an export and name it in genai_config.json, for onnxruntime-genai to load.

Done on request alone: a model folder is data, and this makes it hold a program. The library is copied because
onnxruntime-genai refuses paths outside of the model's folder (0.18 takes those below the current folder too).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diablo_export import runtime
from diablo_export.console import log
from diablo_export.converters import genai_config
from diablo_export.converters.genai_config import CONFIG
from diablo_export.errors import InputError

KEY = "custom_ops_library"
AUTO = "auto"


def find(asked: str | Path | None) -> Path | None:
    """The library that was asked for, as an absolute path: `auto` is this installation's, None is none.

    Raises:
        InputError: there is no such file, none in this installation, or it is no library that onnxruntime takes.
    """
    if asked is None:
        return None
    library = runtime.find_library() if asked == AUTO else Path(asked)
    if library is None:
        raise InputError(f"--custom-ops-library {AUTO}: {runtime.LIBRARY_HELP}\nor leave the option out")
    if not library.is_file():
        raise InputError(f"--custom-ops-library {asked}: no such file; give a library's path, or {AUTO}")
    runtime.check_library(library)
    return library.resolve()


def write(folder: Path, library: Path) -> None:
    """Copy `library` into the folder and name it in its genai_config.json.

    Raises:
        InputError: the export has no such file, as onnxruntime-genai does not run it.
    """
    config = genai_config.read(folder)
    if config is None:
        raise InputError(
            f"--custom-ops-library {library}: this export has no {CONFIG}: onnxruntime-genai does not run it; leave "
            "the option out: diablo_export.runtime.session finds the library by itself"
        )
    shutil.copyfile(library, folder / library.name)
    config["model"]["decoder"].setdefault("session_options", {})[KEY] = library.name
    genai_config.write(folder, config)


def drop(folder: Path) -> None:
    """Take out whatever library a copied genai_config.json names: what is converted does not say what is loaded."""
    dropped: list[str] = []
    config = _without(genai_config.read(folder), dropped)
    if dropped:
        log.warning("%s: left out %s, which named %s", CONFIG, KEY, ", ".join(dropped))
        genai_config.write(folder, config)


def _without(value: Any, dropped: list[str]) -> Any:
    """The same JSON without the key, wherever it stands."""
    if isinstance(value, list):
        return [_without(each, dropped) for each in value]
    if not isinstance(value, dict):
        return value
    dropped += [str(each) for key, each in value.items() if key == KEY]
    return {key: _without(each, dropped) for key, each in value.items() if key != KEY}
