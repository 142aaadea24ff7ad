"""Merge into a copy of an ONNX model: its data is read once, and what is written is hashed on its way.

The bytes of an initializer that a block meets are replaced as they pass by, all others as they were read. The graph is
copied byte for byte, unless it holds such an initializer itself or gets a classifier's head.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import xxhash

from diablo_export.adapter import Adapter
from diablo_export.converters import onnx_file
from diablo_export.converters.direct_write import direct_writer
from diablo_export.converters.onnx_match import Match, match
from diablo_export.converters.onnx_merge import merge_module, put_head, refuse, warn_of_type
from diablo_export.converters.onnx_stored import Bytes, Held, read_on
from diablo_export.errors import ExportError

CHUNK = 1 << 20  # bytes that are hashed and written while they are in the processor's cache

Changed = Mapping[int, Callable[[], Bytes]]  # what takes the place of the bytes from an offset on


def merged_copy(
    source: onnx_file.OnnxModel, folder: Path, adapter: Adapter
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, str]]:
    """Write a model with an adapter merged into it; of a large one a few weights are in memory at a time.

    Args:
        source: the model; its files stay as they are.
        folder: where it is written, as `onnx_file.copy` does.
        adapter: what to merge.

    Returns:
        The modules' entries; by name, the XXH3-128 of the graph and data that were read, and the SHA-256 of the data
        that was written.

    Raises:
        MatchError: adapted modules that the graph does not show.
        ExportError: weights that cannot be merged into, with the reason of each.
        AdapterError: base plus blocks is more than a weight's dtype holds.
    """
    model = source.graph
    found = match(model, adapter.modules, fused=True)
    refuse(source.file, found.values())
    read, written = onnx_file.copy(source, folder, data=False), {}
    held = Held()
    entries: dict[str, dict[str, Any]] = {}

    def merge(one: Match) -> None:
        if one.module.name not in entries:
            entries[one.module.name] = merge_module(one, source.folder, adapter, held)

    def merged(value: ir.Value, users: list[Match]) -> Bytes:
        for one in users:
            merge(one)
        return held.give_up(str(value.name))

    places, inside = _places(source, found, merged)
    for file in source.files[1:]:
        name = file.relative_to(source.folder).as_posix()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        read[file.name], written[name] = rewrite(file, folder / name, places[file])
    for one in found.values():
        merge(one)  # all of it in the graph
    if inside or adapter.saved:
        put_head(model, adapter)
        ir.save(model, folder / onnx_file.MODEL)
    warn_of_type(entries.values())
    return [entries[name] for name in found], read, written


def _places(
    source: onnx_file.OnnxModel, found: Mapping[str, Match], merged: Callable[[ir.Value, list[Match]], Bytes]
) -> tuple[dict[Path, dict[int, Callable[[], Bytes]]], bool]:
    """Per data file, where merged initializers lie and how to get them; whether the graph holds some itself."""
    users: dict[str, list[Match]] = defaultdict(list)
    values: dict[str, ir.Value] = {}
    for one in found.values():
        for piece in one.pieces:
            for value in piece.linear.stored:
                values[str(value.name)] = value
                users[str(value.name)].append(one)
    places: dict[Path, dict[int, Callable[[], Bytes]]] = defaultdict(dict)
    inside = False
    for name, value in values.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            inside = True
            continue
        places[source.folder / tensor.location][tensor.offset or 0] = functools.partial(merged, value, users[name])
    return places, inside


def rewrite(source: Path, target: Path, changed: Changed) -> tuple[str, str]:
    """Copy a file, with other bytes in some places.

    Args:
        source: the file.
        target: the file to write.
        changed: by offset, what to put there; asked for in the file's order, once each.

    Returns:
        The XXH3-128 of the source and the SHA-256 of what was written.

    Raises:
        InputError: the source became shorter. ExportError: two places overlap. OSError: the disk is full, or fails.
    """
    old, new = xxhash.xxh3_128(), hashlib.sha256()
    with source.open("rb", buffering=0) as stream, direct_writer(target) as out:

        def copy(count: int, instead: Bytes | None = None) -> int:
            done = 0
            while done < count:
                room = out.room(1)
                piece = room[: min(room.size, CHUNK, count - done)]
                read_on(stream, piece, source)
                old.update(piece.data)
                if instead is not None:
                    piece[:] = instead[done : done + piece.size]
                new.update(piece.data)
                out.take(piece.size)
                done += piece.size
            return count

        at = 0
        for start in sorted(changed):
            if start < at:
                raise ExportError(f"{source}: two weights that blocks are merged into overlap at byte {start:,}")
            at += copy(start - at)
            instead = changed[start]()
            at += copy(instead.size, instead)
        copy(source.stat().st_size - at)
    return old.hexdigest(), new.hexdigest()
