"""What an output folder was made from, and whether it, its base and its adapters are still what the manifest hashed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diablo_export.adapter import CONFIG, TASKS, Adapter, file_sha256
from diablo_export.checkpoint import Checkpoint, read_json, resolve
from diablo_export.errors import CheckpointError, InputError
from diablo_export.manifest import MANIFEST, file_xxh3
from diablo_export.output import REPORTS

_PRECISIONS = {"F32": "fp32", "F64": "fp32", "F16": "fp16", "BF16": "bf16"}


def base_folder(manifest: Mapping[str, Any], model: str | Path | None, adapters: Mapping[str, Path]) -> Path:
    """The Hugging Face folder of the base: the given one, the manifest's, or what an adapter says it was trained on.

    The manifest's is no Hugging Face folder where an ONNX model was exported; then the adapters are asked.

    Raises:
        InputError: none of them is to be had.
    """
    if model is not None:
        return resolve(model)
    base = manifest.get("base") or {}
    trained_on = (read_json(folder / CONFIG).get("base_model_name_or_path") for folder in adapters.values())
    named = [base.get("path"), base.get("id"), *trained_on]
    for candidate in filter(None, named):
        try:
            folder = resolve(candidate)
        except CheckpointError:
            continue
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    raise InputError(
        f"{MANIFEST}: its base model {base.get('id') or base.get('path')} is not to be had here as a Hugging Face "
        "folder; give it as --model"
    )


def adapter_folders(manifest: Mapping[str, Any], given: Iterable[str]) -> dict[str, Path]:
    """Name → folder of the adapters to check: the manifest's, or those of them that are given.

    Args:
        manifest: of the output folder.
        given: `NAME=PATH`, `NAME`, or `PATH` where the output folder has one adapter; none: all.

    Raises:
        InputError: a name that the output folder does not have, or a folder that is gone.
    """
    known = {entry["name"]: Path(entry["path"]) for entry in manifest.get("adapters") or []}
    if not known:
        raise InputError(f"{MANIFEST}: names no adapter; this folder was not made by diablo-export merge or export")
    chosen: dict[str, Path] = {}
    for text in given:
        name, separator, path = text.partition("=")
        if text in known:
            chosen[text] = known[text]
        elif separator and name in known:
            chosen[name] = Path(path)
        elif len(known) == 1 and Path(text).is_dir():
            chosen[next(iter(known))] = Path(text)
        else:
            raise InputError(
                f"--adapter {text}: this folder has the adapters {', '.join(known)}; give NAME, or NAME=PATH where the "
                "adapter folder has moved"
            )
    chosen = chosen or known
    gone = [f"{name} ({path})" for name, path in chosen.items() if not path.is_dir()]
    if gone:
        raise InputError(f"adapter folders that are not there: {', '.join(gone)}; give them as --adapter NAME=PATH")
    return chosen


def hashes(out: Path, manifest: Mapping[str, Any], base: Path, adapters: Mapping[str, Path]) -> dict[str, Any]:
    """SHA-256 of every file of the folder, of its base and of its adapters, as they are now.

    Returns:
        `{"files", "base", "adapters", "changed", "sources_changed"}`: the hashes by file name, and the names of files
        that the manifest knows with another hash, that are missing, or that nobody announced.
    """
    announced = {name: entry["sha256"] for name, entry in (manifest.get("files") or {}).items()}
    found = {
        path.relative_to(out).as_posix(): file_sha256(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).as_posix() not in (MANIFEST, *REPORTS)
    }
    base_announced: dict[str, str] = (manifest.get("base") or {}).get("files") or {}
    # an ONNX base is not the folder that torch loads
    told = Path((manifest.get("base") or {}).get("path") or base)
    base_found = _of(
        base if any((base / name).is_file() for name in base_announced) else told, base_announced, file_xxh3
    )
    strange = [f"base:{name}" for name in _differing(base_announced, base_found)]
    adapter_found: dict[str, dict[str, str]] = {}
    for entry in manifest.get("adapters") or []:
        if entry["name"] in adapters:
            adapter_found[entry["name"]] = now = _of(adapters[entry["name"]], entry["sha256"], file_sha256)
            strange += [f"{entry['name']}:{name}" for name in _differing(entry["sha256"], now)]
    return {
        "files": found,
        "base": base_found,
        "adapters": adapter_found,
        "changed": _differing(announced, found),
        "sources_changed": strange,
    }


def precision(out: Path, manifest: Mapping[str, Any]) -> str:
    """fp32, fp16, bf16, int8, int4 or int2: what the adapted weights were written as."""
    if manifest.get("foreign"):
        return str(manifest["precision"])
    options = manifest.get("options") or {}
    quantize = manifest.get("quantize") or options.get("quantize") or "none"
    if quantize != "none":
        return str(quantize)
    if is_onnx(out):
        return str(manifest.get("precision") or options.get("precision") or "fp32")
    checkpoint = Checkpoint.open(out)
    stored = [checkpoint.find(f"{module['name']}.weight") for module in manifest.get("modules") or []]
    kinds = {_PRECISIONS.get(info.dtype, "fp32") for info in stored if info is not None}
    return next((kind for kind in ("bf16", "fp16") if kind in kinds), "fp32")


def block_dtype(manifest: Mapping[str, Any]) -> str | None:
    """fp32, fp16 or int8: what the blocks of a branch export are stored in; None: as its graph's floats."""
    stored = (manifest.get("options") or {}).get("block_dtype")
    return str(stored) if stored else None


def is_branch(manifest: Mapping[str, Any]) -> bool:
    """Whether blocks are kept beside the weights."""
    return any(module.get("action") == "branch" for module in manifest.get("modules") or [])


def merged_part(manifest: Mapping[str, Any], adapter: Adapter) -> Adapter:
    """The adapter without the modules that keep their blocks beside the weights in an otherwise merged model."""
    kept = {module["name"] for module in manifest.get("modules") or [] if module.get("action") == "kept"}
    return replace(adapter, modules={name: one for name, one in adapter.modules.items() if name not in kept})


def is_classifier(manifest: Mapping[str, Any]) -> bool:
    """Whether the adapters are of a classifier."""
    return any(entry.get("task_type") == TASKS["text-classification"] for entry in manifest.get("adapters") or [])


def is_onnx(out: Path) -> bool:
    """Whether the folder holds an ONNX model; else it must be a Hugging Face one.

    Raises:
        InputError: it is neither.
    """
    if (out / "model.onnx").is_file():
        return True
    if (out / "config.json").is_file() and any(out.glob("*.safetensors")):
        return False
    raise InputError(f"{out}: holds neither model.onnx nor config.json with *.safetensors; make the folder again")


def _of(folder: Path, names: Iterable[str], digest: Callable[[Path], str]) -> dict[str, str]:
    return {name: digest(folder / name) for name in names if (folder / name).is_file()}


def _differing(announced: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*announced, *found} if announced.get(name) != found.get(name))
