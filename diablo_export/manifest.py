"""diablo_export.json: what an output folder is, how it was made, and the hash of every file in it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from diablo_export import __version__
from diablo_export.adapter import CONFIG, WEIGHTS, Adapter, file_sha256
from diablo_export.errors import CheckpointError, InputError
from diablo_export.output import MANIFEST as MANIFEST
from diablo_export.output import PARITY as PARITY

FORMAT_VERSION = 1
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnx", "torch", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Versions of this program, of Python and of the packages that shape an export, where installed."""
    found = {"diablo-export": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def adapter_entry(name: str, adapter: Adapter) -> dict[str, Any]:
    """How a manifest names an adapter: where it came from, and the hash of its two files."""
    assert adapter.path is not None
    files = {file: file_sha256(adapter.path / file) for file in (CONFIG, WEIGHTS)}
    return {"name": name, "path": str(adapter.path.resolve()), "sha256": files, "task_type": adapter.task_type}


def file_xxh3(file: Path, copy: Path | None = None) -> str:
    """XXH3-128 of a file, in hex: the base's gigabytes are told from others' in a tenth of SHA-256's time.

    What was read is written to `copy` as well.
    """
    # Linux takes writes of 2¹⁸ bytes six times as fast as those of 2²⁰
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 18))
    with file.open("rb", buffering=0) as stream, copy.open("wb") if copy else contextlib.nullcontext() as other:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            if other is not None:
                other.write(buffer[:count])
    return digest.hexdigest()


def base_sha256(files: Mapping[str, str]) -> str:
    """One SHA-256 for a base: over the names and XXH3-128 digests of its weight files, a line each, in name order."""
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def write_manifest(
    folder: Path,
    command: str,
    options: dict[str, Any],
    base: dict[str, Any],
    adapters: list[dict[str, Any]],
    modules: list[dict[str, Any]],
    hashes: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Hash every file in `folder`, write its manifest there and return it.

    Args:
        folder: the output folder, filled.
        command: `merge` or `export`.
        options: the options that the command ran with.
        base: `{"path", "id", "sha256", "files": {weight file: XXH3-128}}` of the base model.
        adapters: one `adapter_entry` each.
        modules: per module what happened to it and why: `{"name", "action", …}`.
        hashes: SHA-256 of files already known from writing them, by name relative to `folder`.
        more: further top-level entries.
    """
    known = hashes or {}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in (MANIFEST, PARITY)
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "command": command,
        "options": options,
        "versions": versions(),
        "base": base,
        "adapters": adapters,
        **more,
        "modules": modules,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(plain(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for both (the decibels of equal logits, the gain of no adapter)."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        InputError: there is none, it is broken, or of another format version.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the output folder of merge or export")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; {folder} was not made by diablo-export merge or export") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: broken ({error!r}); make the folder again") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{file}: format_version is {version!r}, this program reads {FORMAT_VERSION}; make it again")
    return manifest
