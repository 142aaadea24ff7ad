"""Exports of other programs: what a manifest would say of them, where the report goes, hashes. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diablo_export.adapter import CONFIG, TASKS, WEIGHTS, file_sha256
from diablo_export.errors import InputError
from diablo_export.manifest import MANIFEST, PARITY, file_xxh3
from diablo_export.measure import foreign_graph, peft_config
from diablo_export.measure.certificate import CERTIFICATE

_ADAPTER_FILE = "*.onnx_adapter"


def applies(out: Path) -> bool:
    """Whether `out` was made by another program: an ONNX file, or a folder of one without a manifest."""
    if out.is_dir():
        return not (out / MANIFEST).exists() and any(out.rglob("*.onnx"))
    return out.suffix == ".onnx" and out.is_file() and not (out.parent / MANIFEST).exists()


def manifest(out: Path, given: Iterable[str], exported_base: str | Path | None = None) -> dict[str, Any]:
    """What a manifest would say of an export that has none.

    Args:
        out: an ONNX file, or a folder with one.
        given: the adapter, as `PATH` or `NAME=PATH`.
        exported_base: an export of the base by the same program.

    Raises:
        InputError: no adapter, or several; an ONNX model or adapter that cannot be read.
    """
    names = list(given)
    if len(names) != 1:
        raise InputError(
            f"{out}: has no {MANIFEST}, so it was not made by diablo-export; to compare it with base and adapter, give "
            f"--model and one --adapter PATH ({len(names)} given)"
        )
    name, separator, path = names[0].partition("=")
    folder = Path(path if separator else names[0])
    adapter = peft_config.read_config(folder)
    graph = foreign_graph.read(foreign_graph.find(out))
    entry: dict[str, Any] = {
        "name": name if separator else folder.resolve().name,
        "path": str(folder.resolve()),
        "sha256": {},
        "task_type": TASKS[adapter.task],
        "kind": adapter.kind,
    }
    return {
        "foreign": str(graph.file),
        "folder": str((out if out.is_dir() else graph.file.parent).resolve()),
        "exported_base": exported_base is not None or adapter_file(graph.file, entry["name"]) is not None,
        "precision": graph.precision,
        "base": {"path": None, "id": adapter.config.get("base_model_name_or_path"), "files": {}},
        "adapters": [entry],
        "modules": [],
    }


def report_file(out: Path) -> Path:
    """Where the report goes: into the folder, or beside the file."""
    return out / PARITY if out.is_dir() else out.with_name(f"{out.stem}.{PARITY}")


def hashes(out: Path, manifest: Mapping[str, Any], base: Path, adapters: Mapping[str, Path]) -> dict[str, Any]:
    """The hashes of what was compared, as `sources.hashes` gives them; there is nothing to hold them against."""
    graph = foreign_graph.read(foreign_graph.find(out))
    files = [graph.file, *graph.data, *graph.file.parent.glob("*.json")]
    files = [path for path in files if path.is_file() and not path.name.endswith((PARITY, CERTIFICATE))]
    return {
        "files": {path.name: file_sha256(path) for path in files},
        "base": {path.name: file_xxh3(path) for path in sorted(base.glob("*.safetensors"))},
        "adapters": {n: {f: file_sha256(p / f) for f in (CONFIG, WEIGHTS)} for n, p in adapters.items()},
        "changed": [],
        "sources_changed": [],
    }


def adapter_file(file: Path, name: str) -> Path | None:
    """The `.onnx_adapter` beside a graph: the only one, or the one of this name.

    Raises:
        InputError: several, none of this name.
    """
    found = sorted({*file.parent.glob(_ADAPTER_FILE), *file.parent.glob(f"*/{_ADAPTER_FILE}")})
    named = [path for path in found if path.stem == name]
    if len(found) > 1 and len(named) != 1:
        raise InputError(
            f"{file.parent}: holds {', '.join(path.name for path in found)}; say which one it is with "
            f"--adapter NAME=PATH, NAME being the file's name without .onnx_adapter"
        )
    return next(iter(named or found), None)
