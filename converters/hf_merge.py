"""Hugging Face checkpoint + adapter → Hugging Face checkpoint, tensor by tensor.

Only what a block meets is computed; every other byte is copied. The files keep their names, their order of tensors
and their metadata. Each adapted weight is checked against the adapter's fingerprint as it passes through, so the
checkpoint is read once. Reading with merging, hashing and writing run in a thread each; memory follows the largest
adapted weight.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.adapter import AdaptedModule, Adapter, refuse_base, stored_transposed, weight_fault
from diablo_export.blockdiag import Array, add_to_weight
from diablo_export.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint, TensorInfo, header_bytes
from diablo_export.console import log, progress
from diablo_export.converters.hf_folder import copy_others, write_config, write_index
from diablo_export.errors import AdapterError, CheckpointError

CHUNK = 8 << 20  # bytes copied at a time
IN_FLIGHT = 64 << 20  # bytes that may wait for the hash and the disk
_FLOATS = ("F64", "F32", "F16", "BF16")
HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class MergeResult:
    """What `hf_merge` wrote."""

    hashes: dict[str, str]  # SHA-256 of each weight file, by name
    modules: list[dict[str, Any]]  # one entry of the manifest per adapted module


@dataclass(frozen=True)
class _Part:
    """One tensor to write: copied from `source`, merged where there is a `module`, or given as `value`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None = None
    module: AdaptedModule | None = None
    value: Array | None = None
    transposed: bool = False  # stored (in, out), as GPT-2 does


def hf_merge(model: str | Path, adapter: Adapter, folder: Path) -> MergeResult:
    """Write `model` with the adapter's blocks added to its weights into `folder`, which must exist and be empty.

    An adapter with a classification head gives a sequence-classification checkpoint, also from a bare encoder.
    An adapted output head that the base ties to its embeddings is untied.

    Raises:
        AdapterError: the adapter does not fit the model (missing modules, other sizes, other weights).
        CheckpointError: a model that cannot be read, or whose weights are quantized.
    """
    checkpoint = Checkpoint.open(model)
    _refuse_quantized(checkpoint)
    files = _plan(checkpoint, adapter)
    untied = any(part.module and part.name.endswith(HEAD) for parts in files.values() for part in parts)
    write_config(checkpoint, adapter, folder, untied)
    copy_others(checkpoint, folder)
    hashes: dict[str, str] = {}
    modules: list[dict[str, Any]] = []
    with progress("Merging", sum(info.nbytes for info in checkpoint)) as advance:
        for name, parts in files.items():
            header = header_bytes({part.name: (part.dtype, part.shape) for part in parts}, checkpoint.metadata[name])
            hashes[name] = _write(folder / name, header, _stream(parts, checkpoint, adapter, modules, name), advance)
    write_index(checkpoint, {file: {p.name: _nbytes(p) for p in parts} for file, parts in files.items()}, folder)
    _warn_of_rounding(modules)
    return MergeResult(hashes, modules)


def _nbytes(part: _Part) -> int:
    return math.prod(part.shape) * DTYPES[part.dtype].itemsize


def _warn_of_rounding(modules: list[dict[str, Any]]) -> None:
    lossy = [f"{m['name']} keeps {m['weight_gain']:.0%}" for m in modules if not 0.9 <= m["weight_gain"] <= 1.1]
    if lossy:
        more = f" and {len(lossy) - 5} more" if len(lossy) > 5 else ""
        log.warning(
            "rounding to the dtype of the checkpoint changes the blocks: %s%s; merge into a float32 copy of the base",
            ", ".join(lossy[:5]), more,
        )  # fmt: skip


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else "?"
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: quantized with {method}, and blocks cannot be added to packed "
            "weights here; give the float model it was made from (merge --quantize int4 then quantizes "
            "base and blocks together)"
        )


def _plan(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, list[_Part]]:
    """What each output file holds, in order; refuses an adapter whose modules or sizes do not fit."""
    adapted, untied = _match(checkpoint, adapter)
    saved = {_stored_name(checkpoint, name): value for name, value in adapter.saved.items()}
    rename = _renaming(checkpoint, adapter, saved)
    files: dict[str, list[_Part]] = {name: [] for name in sorted(checkpoint.metadata)}
    for info in sorted(checkpoint, key=lambda info: info.start):
        name = rename(info.name)
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; known are {', '.join(DTYPES)}"
            )
        if name is None:
            continue
        if info.name in saved:
            part = _given(name, saved.pop(info.name))
        else:
            part = _Part(name, info.dtype, info.shape, info, adapted.get(info.name), transposed=_flip(checkpoint, info))
        files[info.file.name].append(part)
    files[max(files)] += untied + [_given(name, value) for name, value in saved.items()]
    return files


def _match(checkpoint: Checkpoint, adapter: Adapter) -> tuple[dict[str, AdaptedModule], list[_Part]]:
    """Which stored weight each module is (by stored name), and the heads to be untied; refuses what does not fit."""
    adapted: dict[str, AdaptedModule] = {}
    untied: list[_Part] = []
    faults: list[str] = []
    for module in adapter.modules.values():
        info = checkpoint.find(f"{module.name}.weight")
        if info is not None:
            adapted[info.name] = module
            fault = weight_fault(module, info.shape, _flip(checkpoint, info))
        else:
            info = _tied_source(checkpoint, module)
            fault = None if info else "the model has no such weight"
            if info:
                untied.append(_Part(f"{module.name}.weight", info.dtype, info.shape, info, module))
        if fault is None and info is not None and info.dtype not in _FLOATS:
            fault = f"its weight is stored as {info.dtype}; blocks are added to {', '.join(_FLOATS)} only"
        faults += [f"{module.name}: {fault}"] if fault else []
    refuse_base(adapter, str(checkpoint.folder), faults)
    return adapted, untied


def _flip(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether this weight is stored (in, out); GPT-2's output head is an nn.Linear like anyone's."""
    return stored_transposed(checkpoint.config) and not info.name.endswith(HEAD)


def _given(name: str, value: Array) -> _Part:
    return _Part(name, DTYPE_NAMES[value.dtype], value.shape, value=value)


def _stored_name(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.find(name)
    return info.name if info else name


def _tied_source(checkpoint: Checkpoint, module: AdaptedModule) -> TensorInfo | None:
    """The input embeddings that this adapted output head shares, where the checkpoint stores them once."""
    if "." in module.name:
        return None
    shape = (module.out_features, module.in_features)
    found = [info for info in checkpoint if info.name.endswith(_EMBEDDINGS) and info.shape == shape]
    return found[0] if len(found) == 1 else None


def _renaming(checkpoint: Checkpoint, adapter: Adapter, saved: dict[str, Array]) -> Callable[[str], str | None]:
    """Stored name → name to write; None for the tensors of a head that the new one replaces.

    Without a new head nothing changes. With one, a bare encoder's tensors get the prefix of the model that has the
    head, or the new file would load with every weight missing.
    """
    if all(name in checkpoint.tensors for name in saved):
        return lambda name: name
    prefix = next(iter(adapter.modules)).partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        return lambda name: prefix + name
    return lambda name: name if name.startswith(prefix) or name in saved else None


def _stream(
    parts: list[_Part], checkpoint: Checkpoint, adapter: Adapter, modules: list[dict[str, Any]], file: str
) -> Iterator[memoryview]:
    """The bytes of `parts` in order; appends what was done to `modules`."""
    for part in parts:
        if part.module is not None:
            values, entry = _merged(part, checkpoint, adapter)
            modules.append({**entry, "file": file})
            yield from _chunks(values)
        elif part.value is not None:
            yield from _chunks(part.value)
        elif part.source is not None:
            yield from _read_chunks(part.source)


def _merged(part: _Part, checkpoint: Checkpoint, adapter: Adapter) -> tuple[Array, dict[str, Any]]:
    """The merged weight as stored, and its manifest entry; refuses a base weight with other values."""
    module, source = part.module, part.source
    assert module is not None and source is not None
    stored = source.read()
    weight = stored.T if part.transposed else stored  # (out, in)
    if module.fingerprint is not None and not module.fingerprint.matches(weight):
        adapter.check_base(checkpoint)  # names every module that differs
        refuse_base(adapter, str(checkpoint.folder), [f"{module.name}: its base weight has other values"])
    with np.errstate(over="ignore"):  # an overflow is an error of its own below
        merged = add_to_weight(weight, module.blocks)
    gain = _weight_gain(weight, merged, module)
    if not np.isfinite(gain):
        raise AdapterError(f"{module.name}: base plus blocks overflows {part.dtype}; merge into a float32 copy instead")
    entry = {
        "name": module.name, "action": "merged", "why": f"{part.dtype} weight", "layout": "safetensors",
        "weight": part.name, "transposed": part.transposed, "weight_gain": gain,
    }  # fmt: skip
    return (merged.T if part.transposed else merged), entry


def _weight_gain(before: Array, after: Array, module: AdaptedModule) -> float:
    """How much of the blocks is left in after − before once rounded to the dtype: <left, wanted> / <wanted, wanted>."""
    left = wanted = 0.0
    for block, (inputs, outputs) in enumerate(module.shape.slices()):
        piece = module.blocks[block, : inputs.stop - inputs.start, : outputs.stop - outputs.start].T.astype(np.float32)
        moved = after[outputs, inputs].astype(np.float32) - before[outputs, inputs].astype(np.float32)
        left += float(np.vdot(moved, piece))
        wanted += float(np.vdot(piece, piece))
    return left / wanted if wanted else 1.0


def _chunks(values: Array) -> Iterator[memoryview]:
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK].data


def _read_chunks(info: TensorInfo) -> Iterator[memoryview]:
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.start)
        left = info.nbytes
        while left:
            chunk = stream.read(min(CHUNK, left))
            if not chunk:
                raise CheckpointError(f"{info.file}: ends inside tensor {info.name!r}; copy the file again")
            left -= len(chunk)
            yield memoryview(chunk)


def _write(file: Path, header: bytes, pieces: Iterator[memoryview], advance: Callable[[float], None]) -> str:
    """Write header and pieces to `file` and return its SHA-256; hash and disk work in a thread each."""
    digest = hashlib.sha256(header)
    waiting: deque[tuple[int, Future[None], Future[None]]] = deque()
    held = 0
    with file.open("wb", buffering=0) as out, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
        _write_all(out, memoryview(header))
        for piece in pieces:
            waiting.append((len(piece), hasher.submit(digest.update, piece), writer.submit(_write_all, out, piece)))
            held += len(piece)
            while held > IN_FLIGHT:
                held -= _finish(waiting.popleft(), advance)
        while waiting:
            _finish(waiting.popleft(), advance)
    return digest.hexdigest()


def _finish(job: tuple[int, Future[None], Future[None]], advance: Callable[[float], None]) -> int:
    size, hashed, written = job
    hashed.result()
    written.result()
    advance(size)
    return size


def _write_all(stream: Any, view: memoryview) -> None:
    while len(view):
        view = view[stream.write(view) :]
