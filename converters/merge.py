"""The verb `merge`: an adapter's blocks into the weights of its base, to Hugging Face or to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo_export.adapter import TASKS, Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import onnx_file
from diablo_export.converters.base import hashing
from diablo_export.converters.sizes import check_options, checkpoint_bytes, onnx_bytes
from diablo_export.errors import AdapterError, ExportError, InputError
from diablo_export.manifest import adapter_entry, write_manifest
from diablo_export.output import check_output, new_folder

FORMATS = ("onnx", "hf")


def merge(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    quantize: str = "none",
    format: str | None = None,
    group_size: int = 32,
    asymmetric: bool = False,
    precision: str = "fp32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model` with the adapter merged into its weights.

    Args:
        model: Hugging Face folder or id, or an ONNX file or folder, float or quantized (MatMulNBits): of that
            only the weights that a block meets change, or the groups of weights.
        adapter: adapter folder.
        output: the folder to write.
        quantize: none, int8 or int4, of every linear layer; only ONNX holds quantized weights.
        format: onnx or hf; None: onnx when quantizing, hf otherwise. hf keeps the checkpoint's dtypes.
        group_size: input positions that share a scale, when quantizing.
        asymmetric: a zero point for each group, when quantizing.
        precision: fp32 or fp16, of what an ONNX file holds unquantized.
        overwrite: replace `output` if it exists.

    Returns:
        The manifest.

    Raises:
        AdapterError: an adapter that cannot be read, or belongs to another base; MatchError likewise, for ONNX.
        ExportError: a model that no road to ONNX can take. InputError: options that do not go together.
        OutputError: `output` exists, is not writable, or there is no room.
    """
    check_output(output, overwrite)
    check_options(quantize, group_size, precision)
    chosen = _format(format, quantize, precision)
    given = Adapter.load(adapter)
    if given.task_type not in TASKS.values():
        raise AdapterError(f"{adapter}: task_type is {given.task_type!r}; known are {', '.join(TASKS.values())}")
    source = onnx_file.find(model) or Checkpoint.open(model)
    if isinstance(source, onnx_file.OnnxModel):
        onnx_file.refuse_adapted(source)
        chosen, needs = _as_it_is(source, format, quantize, precision), source.size
    elif chosen == "onnx":
        from diablo_export.converters.onnx_graph import load_exporters

        needs = onnx_bytes(source, quantize, group_size, precision)
        load_exporters()
    else:
        needs = checkpoint_bytes(source)
    said: dict[str, Any] = {"model": str(model), "adapter": str(adapter), "quantize": quantize, "format": chosen}
    said |= {"group_size": group_size, "asymmetric": asymmetric, "precision": precision}
    files = [] if chosen == "hf" else source.files  # that merge hashes what it reads
    with new_folder(output, overwrite, needs) as folder, hashing(model, source.folder, files) as base:
        if isinstance(source, onnx_file.OnnxModel):
            modules, more = _into_onnx(source, given, folder)
        elif chosen == "onnx":
            given.check_base(source)
            modules, more = _to_onnx(model, given, folder, quantize, group_size, asymmetric, precision)
        else:
            modules, more = _to_hf(model, given, folder)
        hashes = more.pop("hashes")
        more = {"task": _task(given), "format": chosen, "quantize": quantize, "precision": precision} | more
        entries = [adapter_entry(Path(adapter).resolve().name, given)]
        read = base(more.pop("read", {}))
        return write_manifest(folder, "merge", said, read, entries, modules, hashes, **more)


def _format(format: str | None, quantize: str, precision: str) -> str:
    """The format asked for, or the one that the other options call for."""
    chosen = format or ("hf" if quantize == "none" else "onnx")
    if chosen not in FORMATS:
        raise InputError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    if chosen == "hf" and quantize != "none":
        raise InputError(
            f"a Hugging Face checkpoint of {quantize} weights is not written here; --quantize {quantize} needs "
            "--format onnx, and --format hf needs --quantize none"
        )
    if chosen == "hf" and precision != "fp32":
        raise InputError("--precision is for --format onnx; a Hugging Face checkpoint keeps the dtypes that it has")
    return chosen


def _as_it_is(source: onnx_file.OnnxModel, format: str | None, quantize: str, precision: str) -> str:
    """An ONNX model stays the ONNX model that it is."""
    if format == "hf" or (quantize, precision) != ("none", "fp32"):
        raise InputError(
            f"{source.file}: is ONNX already and keeps its weights' types; leave out --quantize, --precision and "
            "--format hf, or give the Hugging Face folder that it was made from"
        )
    return "onnx"


def _into_onnx(
    source: onnx_file.OnnxModel, adapter: Adapter, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge into a copy of an ONNX model; the modules' entries, and the rest of the manifest."""
    import onnx_ir as ir

    from diablo_export.converters.onnx_linears import kind, linears
    from diablo_export.converters.onnx_merge import onnx_merge
    from diablo_export.runtime import session

    onnx_file.copy(source, folder)
    modules = onnx_merge(folder / onnx_file.MODEL, adapter)
    session(folder / onnx_file.MODEL)  # a graph that the runtime refuses is no merge
    reason = f"{source.file.name} is an ONNX model already"
    return modules, {"hashes": {}, "exporter": "given", "reason": reason, **kind(linears(ir.load(source.file)))}


def _to_hf(model: str | Path, adapter: Adapter, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge into a checkpoint; the modules' entries, and the rest of the manifest."""
    from diablo_export.converters.hf_merge import hf_merge

    done = hf_merge(model, adapter, folder)
    reason = "a Hugging Face checkpoint was asked for, or is what an unquantized merge gives"
    return done.modules, {"hashes": done.hashes, "read": done.base, "exporter": "hf", "reason": reason}


def _to_onnx(
    model: str | Path,
    adapter: Adapter,
    folder: Path,
    quantize: str,
    group_size: int,
    asymmetric: bool,
    precision: str,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Build the graph while the blocks are added; the modules' entries, and the rest of the manifest."""
    from diablo_export.converters.onnx_graph import build_graph

    built = build_graph(
        model, folder, task=_task(adapter), quantize=quantize, group_size=group_size, symmetric=not asymmetric,
        precision=precision, merged=adapter,
    )  # fmt: skip
    lost = [name for name in adapter.modules if name not in built.modules]
    if lost:
        raise ExportError(
            f"{model}: the {built.exporter} exporter's graph has no node for {len(lost)} adapted modules, so their "
            f"blocks would be lost: {', '.join(lost)}. Merge to Hugging Face (--format hf) instead"
        )
    modules = [
        {"name": name, **built.modules[name], "action": "merged", "why": _why(quantize)} for name in adapter.modules
    ]
    more = {"hashes": built.hashes, "exporter": built.exporter, "reason": built.reason}
    return modules, more


def _why(quantize: str) -> str:
    return "added to the weight" + ("" if quantize == "none" else f", the sum then rounded to {quantize}")


def _task(adapter: Adapter) -> str:
    return next(option for option, kind in TASKS.items() if kind == adapter.task_type)
