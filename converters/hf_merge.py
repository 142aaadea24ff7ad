"""Hugging Face checkpoint + adapter → Hugging Face checkpoint, tensor by tensor.

Only what a block meets is computed; every other byte is copied. The files keep their names, their order of tensors
and their metadata. Each adapted weight is checked against the adapter's fingerprint as it passes through, so the
checkpoint is read once. Weights that are quantized are merged into group by group, see hf_packed.py.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diablo_export.adapter import AdaptedModule, Adapter, refuse_base, stored_transposed, weight_fault
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import DTYPES, EMBEDDINGS, HEAD, Checkpoint, TensorInfo, decoder_class, header_bytes
from diablo_export.console import log, progress
from diablo_export.converters.hf_folder import copy_others, write_config, write_index
from diablo_export.converters.hf_packed import PackedModule, WrongBaseError, packed_modules
from diablo_export.converters.hf_skeleton import skeleton
from diablo_export.converters.hf_stream import Part, given, write_parts
from diablo_export.converters.rounding import lossy, warn_of_rounding
from diablo_export.errors import CheckpointError
from diablo_export.packed.modules import check_base, refuse_unreadable, warn_of_others

THREADS = 4  # files written side by side: while one waits for the disk another computes
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class MergeResult:
    """What `hf_merge` wrote."""

    hashes: dict[str, str]  # SHA-256 of each weight file, by name
    modules: list[dict[str, Any]]  # one entry of the manifest per adapted module
    base: dict[str, str]  # XXH3-128 of each weight file of the base, by name


def hf_merge(model: str | Path, adapter: Adapter, folder: Path, method: str = "refit") -> MergeResult:
    """Write `model` with the adapter's blocks added to its weights into `folder`, which must exist and be empty.

    Weights that are quantized stay so, in their own format; `method`, `refit` or `rtn`, says how they take the blocks.

    An adapter with a classification head gives a sequence-classification checkpoint, also from a bare encoder.
    An adapted output head that the base ties to its embeddings is untied.

    Raises:
        AdapterError: the adapter does not fit the model (missing modules, other sizes, other weights).
        CheckpointError: a model that cannot be read, or whose weights are quantized in a way that is not known here.
    """
    checkpoint = Checkpoint.open(model)
    refuse_unreadable(checkpoint)
    packed = packed_modules(checkpoint, adapter, method)
    files = _plan(checkpoint, adapter, packed)
    changed = (part for parts in files.values() for part in parts if part.module or part.value is not None)
    untied = any(part.name.endswith(HEAD) for part in changed)
    write_config(checkpoint, adapter, folder, untied)
    copy_others(checkpoint, folder)

    def refuse(part: Part) -> None:
        check_base(checkpoint, adapter)  # names every module that differs
        refuse_base(adapter, str(checkpoint.folder), [f"{part.name}: its base weight has other values"])

    modules: dict[str, list[dict[str, Any]]] = {name: [] for name in files}

    def write(name: str, advance: Callable[[float], None]) -> tuple[str, str]:
        parts = files[name]
        header = header_bytes({part.name: (part.dtype, part.shape) for part in parts}, checkpoint.metadata[name])
        note, source = partial(_note, modules[name], name), checkpoint.folder / name
        return write_parts(folder / name, header, parts, note, refuse, advance, source)

    size = sum(info.nbytes for info in checkpoint)
    try:
        with progress("Merging", size) as advance:
            hashes = _side_by_side(write, list(files), advance)
    except WrongBaseError:
        check_base(checkpoint, adapter)
        raise
    entries = [entry for name in files for entry in modules[name]] + [_entry(one) for one in packed.values()]
    write_index(checkpoint, {file: {p.name: _nbytes(p) for p in parts} for file, parts in files.items()}, folder)
    warn_of_others(adapter, [one.very for one in packed.values()])
    lost = lossy(entries)
    warn_of_rounding(lost, "the dtype or grid of the checkpoint", _instead(lost))
    written, base = ({name: pair[side] for name, pair in hashes.items()} for side in (0, 1))
    return MergeResult(written, entries, base)


def _side_by_side(
    write: Callable[[str, Callable[[float], None]], tuple[str, str]],
    names: Sequence[str],
    advance: Callable[[float], None],
) -> dict[str, tuple[str, str]]:
    """`write` every file, a few at a time; when one fails, or on Ctrl-C, the others stop at their next piece."""
    stopped = threading.Event()

    def step(amount: float) -> None:
        if stopped.is_set():
            raise InterruptedError
        advance(amount)

    with ThreadPoolExecutor(THREADS) as threads:
        jobs = {name: threads.submit(write, name, step) for name in names}
        try:
            wait(jobs.values(), return_when=FIRST_EXCEPTION)
            for job in jobs.values():
                if job.done():
                    job.result()  # the first that failed, before waiting for one that did not
            return {name: job.result() for name, job in jobs.items()}
        finally:
            stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)


def _note(modules: list[dict[str, Any]], file: str, part: Part, gain: float) -> None:
    """Append the manifest entry of a merged part."""
    assert part.module is not None
    modules.append({
        "name": part.module.name, "action": "merged", "why": f"{part.dtype} weight", "layout": "safetensors",
        "weight": part.name, "transposed": part.transposed, "file": file, "weight_gain": gain,
    })  # fmt: skip


def _entry(one: PackedModule) -> dict[str, Any]:
    """The manifest entry of a quantized module."""
    assert one.change is not None
    info = one.stored.infos[one.stored.codec.MARK]
    return {
        "name": one.module.name, "action": "merged", "layout": one.stored.config["quant_method"], "method": one.method,
        "weight": info.name, "transposed": False, "file": info.file.name, **one.change.describe(),
    }  # fmt: skip


def _nbytes(part: Part) -> int:
    return math.prod(part.shape) * DTYPES[part.dtype].itemsize


def _instead(modules: Iterable[Mapping[str, Any]]) -> str:
    """What to do where rounding takes too much."""
    if any(module["layout"] != "safetensors" for module in modules):
        return "merge --quantize int4 from the float model trains the codes on what the tuned model answers"
    return "merge into a float32 copy of the base"


def _plan(checkpoint: Checkpoint, adapter: Adapter, packed: Mapping[str, PackedModule]) -> dict[str, list[Part]]:
    """What each output file holds, in order; refuses an adapter whose modules or sizes do not fit."""
    adapted, untied = _match(checkpoint, adapter, packed)
    made = {stored: partial(one.tensor, suffix) for one in packed.values() for stored, suffix in one.changed.items()}
    saved = {_stored_name(checkpoint, name): value for name, value in adapter.saved.items()}
    rename = _renaming(checkpoint, adapter, saved)
    files: dict[str, list[Part]] = {name: [] for name in sorted(checkpoint.metadata)}
    for info in sorted(checkpoint, key=lambda info: info.start):
        name = rename(info.name)
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has dtype {info.dtype}; known are {', '.join(DTYPES)}"
            )
        if name is None:
            continue
        if info.name in saved:
            part = given(name, saved.pop(info.name))
            untied += _embeddings_beside(checkpoint, info)
        elif info.name in made:
            part = Part(name, info.dtype, info.shape, make=made[info.name])
        else:
            module = adapted.get(info.name)
            transposed = module is not None and stored_transposed(checkpoint.config, module.name)
            part = Part(name, info.dtype, info.shape, info, module, transposed=transposed)
        files[info.file.name].append(part)
    files[max(files)] += untied + [given(name, value) for name, value in saved.items()]
    return files


def _match(
    checkpoint: Checkpoint, adapter: Adapter, packed: Mapping[str, PackedModule]
) -> tuple[dict[str, AdaptedModule], list[Part]]:
    """Which stored weight each module is (by stored name), and what untied heads need; refuses what does not fit."""
    adapted: dict[str, AdaptedModule] = {}
    untied: list[Part] = []
    faults: list[str] = []
    for module in adapter.modules.values():
        if module.name in packed:
            fault = packed[module.name].stored.size_fault(module)
            faults += [f"{module.name}: {fault}"] if fault else []
            continue
        info = checkpoint.weight_of(module.name)
        if info is None:
            faults.append(f"{module.name}: the model has no such weight")
            continue
        if info.name.endswith(EMBEDDINGS):
            untied.append(Part(f"{module.name}.weight", info.dtype, info.shape, info, module))
        else:
            adapted[info.name] = module
            untied += _embeddings_beside(checkpoint, info)
        fault = weight_fault(module, info.shape, stored_transposed(checkpoint.config, module.name))
        if fault is None and info.dtype not in _FLOATS:
            fault = f"its weight is stored as {info.dtype}; blocks are added to {', '.join(_FLOATS)} only"
        faults += [f"{module.name}: {fault}"] if fault else []
    refuse_base(adapter, str(checkpoint.folder), faults)
    return adapted, untied


def _stored_name(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.find(name)
    return info.name if info else name


def _embeddings_beside(checkpoint: Checkpoint, head: TensorInfo) -> list[Part]:
    """The input embeddings as they were, where `head` is an output head that the checkpoint stores for both."""
    if not head.name.endswith(HEAD) or any(info.name.endswith(EMBEDDINGS) for info in checkpoint):
        return []
    model = skeleton(checkpoint.folder, decoder_class(checkpoint.config))
    embeddings = model.get_input_embeddings()
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is embeddings)
    return [] if checkpoint.find(name) else [Part(name, head.dtype, head.shape, head)]


def _renaming(checkpoint: Checkpoint, adapter: Adapter, saved: dict[str, Array]) -> Callable[[str], str | None]:
    """Stored name → name to write; None for the tensors of a head that the new one replaces.

    Without a new head nothing changes. With one, a bare encoder's tensors get the prefix of the model that has the
    head, or the new file would load with every weight missing; what the classifier has no place for goes.

    Raises:
        AdapterError: the classifier has parameters that neither side holds.
    """
    if not adapter.classifies or all(name in checkpoint.tensors for name in saved):
        return lambda name: name
    prefix = next(iter(adapter.modules)).partition(".")[0] + "."
    known = _classifier_parameters(checkpoint)
    if any(name.startswith(prefix) for name in checkpoint.tensors):
        places = {*saved, *(name for names in known for name in names)}
        kept = {name: name for name in checkpoint.tensors if name.startswith(prefix) or name in places}
    else:
        kept = {name: prefix + name for name in checkpoint.tensors}
    held = {_owner(name) for name in (*kept.values(), *saved)}  # not names: BERT's norms once had a gamma
    absent = [names[0] for names in known if not held.intersection(map(_owner, names))]
    faults = [f"{name}: the classifier has it, and neither this model nor the adapter" for name in absent]
    refuse_base(adapter, str(checkpoint.folder), faults)
    return kept.get


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _classifier_parameters(checkpoint: Checkpoint) -> list[list[str]]:
    """The names of each parameter of this model as a classifier; nothing where transformers cannot tell."""
    try:
        model = skeleton(checkpoint.folder, "AutoModelForSequenceClassification")
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        log.debug("the names of the classifier's parameters are not known: %s", error)
        return []
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
