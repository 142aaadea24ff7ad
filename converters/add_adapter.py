"""Add adapters to a branch export that is there already: its graph stays as it is, only `adapters/` grows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from diablo_export.adapter import Adapter, file_sha256, ordered_classes
from diablo_export.block_storage import BASE_KEY, BLOCKS_SUFFIX, SCALES_SUFFIX
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import read_json
from diablo_export.console import log
from diablo_export.converters import onnx_file
from diablo_export.converters.base import hashing
from diablo_export.converters.onnx_adapters import (
    ENDING,
    FOLDER,
    check_classes,
    storage_errors,
    tensors,
    write_onnx_adapter,
)
from diablo_export.converters.onnx_match import match
from diablo_export.errors import AdapterError, InputError, MatchError, OutputError
from diablo_export.manifest import MANIFEST, PARITY, adapter_entry, read_manifest
from diablo_export.measure import certificate
from diablo_export.runtime import load_adapter


def add_adapters(
    source: onnx_file.OnnxModel | None,
    model: str | Path,
    weights: tuple[Path, list[Path]],
    adapters: Mapping[str, Adapter],
    folder: Path,
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Write `adapters` into an export of the same base; returns its manifest.

    Args:
        source: the base where it is an ONNX model; adapters for a Hugging Face one were checked against it before.
        model: the base as the user gave it.
        weights: the base's folder and weight files.
        adapters: by the names that they get.
        folder: the export.
        overwrite: replace adapters of the same names.

    Raises:
        InputError: no branch export, one for the web, or one of another base.
        OutputError: it has an adapter of that name.
        MatchError: modules that the graph has no branch for. AdapterError: another head, or other classes.
    """
    manifest = read_manifest(folder)
    _check_export(manifest, folder, adapters, overwrite)
    with hashing(model, *weights) as base:
        found = base()["sha256"]
    if found != manifest["base"]["sha256"]:
        raise InputError(
            f"{folder}: was exported from another base, {manifest['base'].get('path')} (SHA-256 over its weights "
            f"{manifest['base']['sha256'][:12]}…), than {model} ({found[:12]}…); export the adapter into a new folder"
        )
    graph = ir.load(folder / onnx_file.MODEL)
    fed = load_adapter(folder / manifest["adapters"][0]["file"]).names  # a graph may have other defaults of its own
    inputs = {str(value.name): value for value in graph.graph.inputs if value.name in fed}
    for name, adapter in adapters.items():
        if source is not None:
            match(source.graph, adapter.modules)
        _check_inputs(name, adapter, inputs, manifest)
        check_classes(name, adapter, _classes(folder))
    types = {name: value.dtype.numpy() for name, value in inputs.items() if value.dtype is not None}
    mark = graph.metadata_props.get(BASE_KEY)
    values = {name: tensors(adapter, types) for name, adapter in adapters.items()}
    (folder / PARITY).unlink(missing_ok=True)  # it would say "pass" of a folder that it has not seen
    certificate.revoke(folder)
    for name, adapter in adapters.items():
        _write(folder, name, adapter, values[name], mark, manifest)
    log.info("parity of %s has to be checked again", folder)
    _replace(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _check_export(manifest: Mapping[str, Any], folder: Path, adapters: Mapping[str, Adapter], overwrite: bool) -> None:
    if manifest.get("command") != "export":
        raise InputError(f"{folder}: was made by {manifest.get('command')}; adapters can be added to branch exports")
    if manifest.get("for") == "web":
        raise InputError(f"{folder}: was exported for the web; export it again with all its adapters")
    there = {entry["name"] for entry in manifest["adapters"]} & adapters.keys()
    if there and not overwrite:
        raise OutputError(
            f"{folder}: has an adapter {', '.join(sorted(there))} already; name the new one otherwise with --adapter "
            "NAME=FOLDER, or replace it with --overwrite"
        )


def _check_inputs(name: str, adapter: Adapter, inputs: Mapping[str, ir.Value], manifest: Mapping[str, Any]) -> None:
    """What the adapter changes must be what the graph lets be fed."""
    absent = [module for module in adapter.modules if f"{module}{BLOCKS_SUFFIX}" not in inputs]
    if absent:
        raise MatchError(
            f"adapter {name} ({adapter.path}): the graph has no branch for {len(absent)} of its "
            f"{len(adapter.modules)} modules ({', '.join(absent[:5])}); export again with all adapters"
        )
    heads = {n: value.shape for n, value in inputs.items() if not n.endswith((BLOCKS_SUFFIX, SCALES_SUFFIX))}
    wanted = {n: list(shape.numpy()) for n, shape in heads.items() if shape is not None}
    given = {n: list(value.shape) for n, value in adapter.saved.items()}
    task = manifest["adapters"][0]["task_type"]
    if wanted != given or adapter.task_type != task:
        raise AdapterError(
            f"adapter {name} ({adapter.path}): is a {adapter.task_type} adapter with the head {given}, the export is "
            f"for {task} with {wanted}; export it into a folder of its own"
        )


def _classes(folder: Path) -> list[str]:
    """The class names in config.json, in class order; an ONNX base may have brought none."""
    file = folder / "config.json"
    return ordered_classes(read_json(file).get("id2label")) if file.exists() else []


def _write(
    folder: Path,
    name: str,
    adapter: Adapter,
    values: Mapping[str, Array],
    mark: str | None,
    manifest: dict[str, Any],
) -> None:
    """Write one adapter's file, and what the manifest says of it."""
    errors = storage_errors(name, adapter, values)
    file = f"{FOLDER}/{name}{ENDING}"
    write_onnx_adapter(folder / file, values, mark)
    others = [entry for entry in manifest["adapters"] if entry["name"] != name]
    manifest["adapters"] = [*others, {**adapter_entry(name, adapter), "file": file}]
    manifest["options"]["adapter"][name] = str(adapter.path)
    manifest["files"][file] = {"bytes": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
    for module in manifest["modules"]:
        module["adapters"] = [n for n in module["adapters"] if n != name]
        module.get("block_error", {}).pop(name, None)
        if module["name"] in adapter.modules:
            module["adapters"].append(name)
        if module["name"] in errors:
            module.setdefault("block_error", {})[name] = errors[module["name"]]


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
