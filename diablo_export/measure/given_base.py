"""The base of a merge into an ONNX model that was there already: that model, where it is at hand and unchanged.

Whoever made it, and however it was rounded, it is what was merged into. Compared with it weight by weight, a merge must
leave everything alone outside of the groups that meet a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.errors import InputError
from diablo_export.manifest import file_xxh3
from diablo_export.measure.exported_base import Mask, Stored, flat, is_slice, reached
from diablo_export.quantization import unpack


def given_base(manifest: Mapping[str, Any], adapter: Adapter) -> Path | None:
    """The ONNX model that the manifest's merge began with.

    None where it was no such merge, where the file is gone or another by now, and for an adapter with a head of its
    own, which a base without it cannot stand for.
    """
    if manifest.get("exporter") != "given" or adapter.saved:
        return None
    folder = Path(str(manifest["options"]["model"]))
    if folder.is_file():
        folder = folder.parent
    files = {folder / name: digest for name, digest in (manifest["base"].get("files") or {}).items()}
    graphs = [file for file in files if file.suffix == ".onnx"]
    same = all(file.is_file() and file_xxh3(file) == digest for file, digest in files.items())
    return graphs[0] if len(graphs) == 1 and same else None


def foreign(given: Path, merged: Path, modules: list[dict[str, Any]], adapter: Adapter) -> list[str]:
    """The modules whose merged weight differs from the given one where no block, or no group of one, reaches.

    Args:
        given: the model that was merged into.
        merged: the model.onnx that came of it.
        modules: the manifest's entries, which say how each weight lies.
        adapter: what was merged.

    Raises:
        InputError: the manifest names what the models or the adapter do not have.
    """
    before, after = Stored(given), Stored(merged)
    found = set()
    for entry in flat(modules):
        module = adapter.modules.get(entry["name"])
        if module is None:
            raise InputError(f"{merged.parent}: holds a merged {entry['name']}, which the adapter {adapter.path} lacks")
        met = reached(module.shape)
        if is_slice(entry, module):
            met = met[slice(*entry["rows"])]
        old, new = (_oriented(entry, stored.read(entry["weight"]), len(met)) for stored in (before, after))
        alone = ~_of_groups(entry, met, old)
        if not np.array_equal(old[alone], new[alone]) or _rescaled(entry, met, before, after):
            found.add(entry["name"])
    return sorted(found)


def _rescaled(entry: Mapping[str, Any], met: Mask, before: Stored, after: Stored) -> bool:
    """Whether the scale or zero point of a group that meets no block is another one."""
    if not entry.get("bits"):
        return False
    groups = _groups(entry, met)
    for key in ("scales", "zero_points"):
        if entry.get(key) in before.tensors:
            old, new = (_by_group(entry, key, stored, len(met)) for stored in (before, after))
            if old.shape == new.shape == groups.shape and not np.array_equal(old[~groups], new[~groups]):
                return True  # of another shape is one scale for all, which any block may move
    return False


def _by_group(entry: Mapping[str, Any], key: str, stored: Stored, rows: int) -> Array:
    """A module's scales or zero points, (out, groups)."""
    values = stored.read(entry[key])
    if entry["layout"] == "MatMulNBits":
        codes = stored.tensors[entry["weight"]].dims
        values = values.reshape(codes[0], -1)
        packed = key == "zero_points" and values.dtype == np.uint8
        return _rows(entry, unpack(values, entry["bits"], codes[1]) if packed else values, rows)
    return _oriented(entry, values, rows) if values.ndim > 1 else _rows(entry, values.reshape(-1, 1), rows)


def _oriented(entry: Mapping[str, Any], whole: Array, rows: int) -> Array:
    """A module's rows of a stored weight, or of its codes, (out, …)."""
    weight = whole.T if entry["transposed"] else whole
    return _rows(entry, weight, rows)


def _rows(entry: Mapping[str, Any], values: Array, count: int) -> Array:
    """A module's `count` rows of what a weight holds, which may be several modules'."""
    return values[slice(*entry["rows"])] if entry.get("rows") and len(values) > count else values


def _of_groups(entry: Mapping[str, Any], met: Mask, like: Array) -> Mask:
    """Which of these weights, or of MatMulNBits' bytes, lie in a group that meets a block."""
    if not entry.get("bits"):
        return met
    groups = _groups(entry, met)
    if like.ndim == 3:  # (out, groups, bytes)
        return np.broadcast_to(groups[..., None], like.shape)
    return np.repeat(groups, int(entry["group_size"]), axis=1)[:, : met.shape[1]]


def _groups(entry: Mapping[str, Any], met: Mask) -> Mask:
    """Which groups meet a block: (out, groups)."""
    size = int(entry["group_size"])
    padded = np.pad(met, ((0, 0), (0, -met.shape[1] % size)))
    return np.asarray(padded.reshape(len(padded), -1, size).any(-1))
