"""The paper's adapter.chkpt ↔ an adapter folder.

The file is a state dict that torch.save wrote: `<module path>.block_A` → (num_blocks, block_size_in,
block_size_out). It says neither num_blocks nor targets nor base: the first two are recovered from it, and all of it
is checked against the base that is given. Code in the file is never run: torch reads tensors and nothing else.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.adapter import AdaptedModule, Adapter, stored_transposed
from diablo_export.blockdiag import Array, BlockShape, shape_of
from diablo_export.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint, TensorInfo
from diablo_export.console import log
from diablo_export.errors import AdapterError, InputError, OutputError, indented, require
from diablo_export.fingerprint import fingerprint
from diablo_export.output import keep_inputs, new_file, new_folder
from diablo_export.packed.modules import check_base, refuse_unreadable, stored

BLOCKS = ".block_A"
HEAD = "score."  # the paper's filter keeps entries with "block" or "score" in their name
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote and what it left out."""

    output: Path
    modules: list[str]
    num_blocks: int
    target_modules: list[str]
    skipped: list[tuple[str, str]]  # entry of the file, why


def convert(file: str | Path, model: str | Path, output: str | Path, overwrite: bool = False) -> Conversion:
    """An adapter.chkpt to an adapter folder, or an adapter folder back to an adapter.chkpt.

    Args:
        file: the paper's file, or an adapter folder.
        model: the base, a Hugging Face folder or id; sizes are checked against it, fingerprints taken from it.
        output: the adapter folder, or the file, to write.
        overwrite: replace `output`.

    Raises:
        AdapterError: entries that do not fit the base, all listed; NaN or inf; or an adapter for another base.
        InputError: a file that holds anything but tensors, or no blocks.
        OutputError: `output` exists or cannot be written.
    """
    keep_inputs(output, file, model)
    source, checkpoint = Path(file), Checkpoint.open(model)
    refuse_unreadable(checkpoint)
    if source.is_dir():
        return _to_file(Adapter.load(source), checkpoint, Path(output), overwrite)
    adapter, skipped = read_chkpt(source, checkpoint, str(model))
    with new_folder(output, overwrite) as folder:
        adapter.save(folder)
    return Conversion(Path(output), list(adapter.modules), adapter.num_blocks, adapter.target_modules, skipped)


def read_chkpt(file: Path, checkpoint: Checkpoint, base: str) -> tuple[Adapter, list[tuple[str, str]]]:
    """The adapter in the paper's file, checked against its base, and the entries left out with the reason."""
    entries = load_tensors(file)
    modules: dict[str, AdaptedModule] = {}
    saved: dict[str, Array] = {}
    skipped: list[tuple[str, str]] = []
    faults: list[str] = []
    for name, value in entries.items():
        path = name.removesuffix(BLOCKS)
        if path != name:
            module = _module(path, value, checkpoint, faults)
            if module is not None:
                modules[path] = module
        elif name.startswith(HEAD):
            saved[name] = value
        elif _same(checkpoint.find(name), value):
            skipped.append((name, "an unchanged weight of the base"))
        else:
            faults.append(f"{name}: neither blocks nor a score head, and not in the base with these values")
        if not np.isfinite(value).all():
            faults.append(f"{name}: holds NaN or inf")
    if not any(name.endswith(BLOCKS) for name in entries):
        faults.append(f"no entry ends in {BLOCKS}; it holds {', '.join(list(entries)[:5]) or 'nothing'}")
    if faults:
        raise AdapterError(f"{file} is no adapter for {checkpoint.folder}:\n{indented(faults, 20)}")
    for name, why in skipped:
        log.info("left out %s: %s", name, why)
    # padding can only lower a module's count, so the largest is nearest to what was asked for
    num_blocks = max(len(module.blocks) for module in modules.values())
    targets = sorted({path.rpartition(".")[2] for path in modules})
    labels = [f"LABEL_{i}" for i in range(len(saved[f"{HEAD}weight"]))] if f"{HEAD}weight" in saved else []
    task = "SEQ_CLS" if saved else "CAUSAL_LM"
    return Adapter(modules, task, base, num_blocks, targets, saved, labels), skipped


def load_tensors(file: str | Path) -> dict[str, Array]:
    """The tensors of a file that torch.save wrote; refuses whatever else it holds.

    Raises:
        InputError: missing, cut short, no such file, or a pickle that names anything but tensors.
    """
    torch = require("torch", "train")
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the paper's adapter.chkpt, or an adapter folder")
    try:
        found = torch.load(file, weights_only=True, mmap=zipfile.is_zipfile(file), map_location="cpu")
    except Exception as error:  # torch raises many kinds, and its message advises to run the code
        called = re.search(r"GLOBAL (\S+)", str(error))
        if called:
            raise InputError(
                f"{file}: refused: reading it would call {called[1]}. An adapter.chkpt holds tensors only; nothing in "
                "this file was run. Ask its author for a plain state dict"
            ) from None
        raise InputError(
            f"{file}: torch cannot read it ({type(error).__name__}); it was cut short, or torch.save did not write it"
        ) from None
    return _as_arrays(file, found)


def _as_arrays(file: Path, found: Any) -> dict[str, Array]:
    torch = require("torch", "train")
    if not isinstance(found, Mapping):
        raise InputError(f"{file}: holds a {type(found).__name__}; an adapter.chkpt is a dict of tensors by name")
    known = {getattr(torch, name): DTYPES[short] for short, name in _TORCH.items()}
    strange = [
        f"{name!r}: {getattr(value, 'dtype', type(value).__name__)}"
        for name, value in found.items()
        if not isinstance(name, str) or getattr(value, "dtype", None) not in known
    ]
    if strange:
        raise InputError(f"{file}: every entry must be a float tensor by name; found {', '.join(strange[:5])}")
    raw = {name: value.contiguous().reshape(-1).view(torch.uint8).numpy().copy() for name, value in found.items()}
    return {name: raw[name].view(known[value.dtype]).reshape(value.shape) for name, value in found.items()}


def _module(path: str, blocks: Array, checkpoint: Checkpoint, faults: list[str]) -> AdaptedModule | None:
    """The adapted module with the base's sizes and fingerprint; None, and a fault, where it does not fit."""
    found = stored(checkpoint, path) or checkpoint.weight_of(path)
    if found is None or len(found.shape) != 2:
        faults.append(f"{path}: the base has no such linear layer")
        return None
    transposed = isinstance(found, TensorInfo) and stored_transposed(checkpoint.config, path)
    out_features, in_features = found.shape[::-1] if transposed else found.shape
    try:
        _check_shape(shape_of(blocks, in_features, out_features))
    except InputError as error:
        faults.append(f"{path}: {error}")
        return None
    weight = found.read() if isinstance(found, TensorInfo) else found.unpacked().values()
    mark = fingerprint(weight.T if transposed else weight) if DTYPE_NAMES[weight.dtype] in _TORCH else None
    return AdaptedModule(path, blocks, in_features, out_features, mark)


def _check_shape(shape: BlockShape) -> None:
    """Refuse blocks that cover the module, but that its sizes cannot have given."""
    needed = max(-(-shape.in_features // shape.block_size_in), -(-shape.out_features // shape.block_size_out))
    if shape.num_blocks != needed:
        raise InputError(
            f"blocks of shape {shape.blocks} on {shape.in_features} → {shape.out_features} features: {needed} would "
            f"cover it, there are {shape.num_blocks}; the file belongs to another model"
        )


def _same(info: TensorInfo | None, value: Array) -> bool:
    if info is None or info.shape != value.shape:
        return False
    return bool(np.array_equal(info.read().astype(np.float32), value.astype(np.float32)))


def _to_file(adapter: Adapter, checkpoint: Checkpoint, output: Path, overwrite: bool) -> Conversion:
    torch = require("torch", "train")
    check_base(checkpoint, adapter)
    if adapter.base_grid is not None:
        raise AdapterError(
            f"{adapter.path}: was trained beside {adapter.base_grid} weights, which the paper's file cannot say: its "
            "blocks would come back as ones for the float base. Keep the adapter folder"
        )
    if output.is_dir() or (output.exists() and not overwrite):
        what = "is a folder; give a file name" if output.is_dir() else "exists already; choose another, or --overwrite"
        raise OutputError(f"{output}: {what}, such as adapter.chkpt")
    arrays = {f"{name}{BLOCKS}": module.blocks for name, module in adapter.modules.items()} | adapter.saved
    tensors = {
        name: torch
        .from_numpy(np.array(value).reshape(-1).view(np.uint8))
        .view(getattr(torch, _TORCH[DTYPE_NAMES[value.dtype]]))
        .reshape(value.shape)
        for name, value in arrays.items()
    }
    with new_file(output, overwrite) as file:
        content = io.BytesIO()  # of a disk that is full torch.save says something else
        torch.save(tensors, content)
        file.write_bytes(content.getbuffer())
    strange = [(name, "the paper's code reads no such head") for name in adapter.saved if not name.startswith(HEAD)]
    for name, why in strange:
        log.warning("%s is in the file, but %s", name, why)
    return Conversion(output, list(adapter.modules), adapter.num_blocks, adapter.target_modules, [])
