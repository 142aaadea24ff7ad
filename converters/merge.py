"""The verb `merge`: an adapter's blocks into the weights of its base, to Hugging Face or to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo_export.adapter import TASKS, Adapter
from diablo_export.base_grid import BITS
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log
from diablo_export.converters import onnx_file
from diablo_export.converters.base import hashing
from diablo_export.converters.sizes import check_options, checkpoint_bytes, onnx_bytes
from diablo_export.converters.trained_grid import grids, numbers, output_grid, warn_of_another
from diablo_export.errors import AdapterError, CheckpointError, ExportError, InputError
from diablo_export.manifest import adapter_entry, write_manifest
from diablo_export.output import check_output, new_folder

FORMATS = ("onnx", "hf")
METHODS = ("auto", "rtn", "refit", "calibrated", "distilled")
MIN_SURVIVAL = 0.97
MAX_SECONDS = 900.0


def merge(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    quantize: str = "none",
    format: str | None = None,
    group_size: int | None = None,
    asymmetric: bool | None = None,
    precision: str = "fp32",
    method: str | None = None,
    calibration: str | Path | None = None,
    reference: str | Path | None = None,
    min_survival: float = MIN_SURVIVAL,
    max_seconds: float = MAX_SECONDS,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model` with the adapter merged into its weights.

    Args:
        model: Hugging Face folder or id, or an ONNX file or folder, float or quantized: of that only the weights
            that a block meets change, or the groups of weights.
        adapter: adapter folder.
        output: the folder to write.
        quantize: none, int8, int4 or int2, of every linear layer; only ONNX holds quantized weights.
        format: onnx or hf; None: onnx when quantizing, hf otherwise. hf keeps the checkpoint's dtypes.
        group_size: input positions that share a scale, when quantizing; None: those that the adapter was trained
            beside, or what `base_grid.usual` says of the task.
        asymmetric: a zero point for each group, when quantizing; None: likewise.
        precision: fp32 or fp16, of what an ONNX file holds unquantized.
        method: how quantized weights take the blocks, see docs/merging.md: rtn, refit, calibrated, distilled, or
            auto, the first of these that keeps `min_survival`. None: auto for 4 bits and fewer, rtn for 8; refit
            for a Hugging Face checkpoint that is quantized already, which takes that or rtn.
        calibration: data to measure and calibrate on; None: text that the tuned model writes.
        reference: the float model that an ONNX model was made from, Hugging Face folder or id; None: what the
            adapter names as its base.
        min_survival: least cosine of what the adapter does to the logits with what it should do; its gain may be
            as far from 1.
        max_seconds: about what a method other than rtn may take.
        seed: of the text and its order.
        overwrite: replace `output` if it exists.

    Returns:
        The manifest. `manifest["survival"]["passed"]` says whether `min_survival` was kept, where that was measured.

    Raises:
        AdapterError: an adapter that cannot be read, or belongs to another base; MatchError likewise, for ONNX.
        ExportError: a model that no road to ONNX can take. InputError: options that do not go together.
        DataError: calibration data that cannot be used.
        OutputError: `output` exists, is not writable, or there is no room.
    """
    check_output(output, overwrite)
    _check_method(method, calibration, min_survival, max_seconds)
    check_options(quantize, group_size, precision)
    chosen = _format(format, quantize, precision)
    given = Adapter.load(adapter)
    if given.task_type not in TASKS.values():
        raise AdapterError(f"{adapter}: task_type is {given.task_type!r}; known are {', '.join(TASKS.values())}")
    group_size, asymmetric = output_grid([given], quantize, group_size, asymmetric)
    source = onnx_file.find(model) or Checkpoint.open(model)
    if isinstance(source, onnx_file.OnnxModel):
        onnx_file.refuse_adapted(source)
        chosen, needs = _as_it_is(source, format, quantize, precision), source.size
        how, reference = _for_onnx(source, given, method, calibration, reference)
    elif chosen == "onnx":
        _refuse_packed(source)
        needs = onnx_bytes(source, quantize, group_size, precision)
        how, reference = _for_checkpoint(source, quantize, method, calibration, reference), model
        _load(how)
    else:
        needs, how = checkpoint_bytes(source), _for_checkpoint(source, quantize, method, calibration, reference)
    said: dict[str, Any] = {"model": str(model), "adapter": str(adapter), "quantize": quantize, "format": chosen}
    said |= {"group_size": group_size, "asymmetric": asymmetric, "precision": precision, "method": how}
    limits: dict[str, Any] = {"min_survival": min_survival, "max_seconds": max_seconds, "seed": seed}
    said |= limits | {"calibration": calibration and str(calibration), "reference": reference and str(reference)}
    options = limits | {"method": how, "calibration": calibration, "reference": reference}
    if isinstance(source, Checkpoint):
        warn_of_another([given], [numbers(quantize, group_size, asymmetric)])
    made = isinstance(source, Checkpoint) and chosen == "onnx"
    files = source.files if made else []  # other merges hash what they read
    with new_folder(output, overwrite, needs) as folder, hashing(model, source.folder, files) as base:
        if isinstance(source, onnx_file.OnnxModel):
            modules, more = _into_onnx(source, given, folder, options)
        elif chosen == "onnx":
            given.check_base(source)
            modules, more = _to_onnx(model, given, folder, quantize, group_size, asymmetric, precision, options)
        else:
            modules, more = _to_hf(model, given, folder, how)
        hashes = more.pop("hashes")
        more = {"task": _task(given), "format": chosen, "quantize": quantize, "precision": precision} | more
        entries = [adapter_entry(Path(adapter).resolve().name, given)]
        read = base(more.pop("read", {}))
        return write_manifest(folder, "merge", said, read, entries, modules, hashes, **more)


def _check_method(method: str | None, calibration: object, min_survival: float, max_seconds: float) -> None:
    """Refuse values that the options do not have."""
    faults = []
    if method is not None and method not in METHODS:
        faults.append(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if not 0 < min_survival < 1:
        faults.append(f"min_survival is {min_survival}; it must be between 0 and 1, such as 0.97")
    if not max_seconds > 0:
        faults.append(f"max_seconds is {max_seconds}; it must be above 0")
    if calibration is not None and method in ("rtn", "refit"):
        faults.append(f"--calibration is not looked at by --method {method}; leave one of them out")
    if faults:
        raise InputError("; ".join(faults))


def _for_checkpoint(source: Checkpoint, quantize: str, method: str | None, calibration: Any, reference: Any) -> str:
    """The method for a Hugging Face model."""
    if reference is not None:
        raise InputError("--reference is for an ONNX --model; a Hugging Face model is its own reference")
    if quantize == "none" and source.config.get("quantization_config"):
        return _for_packed(method, calibration)
    if quantize == "none":
        _refuse_unused(method, calibration, "--quantize none rounds nothing")
        return "exact"
    chosen = method or ("auto" if BITS[quantize] <= 4 else "rtn")
    return _if_it_fits(source, chosen, given=method is not None)


def _refuse_packed(source: Checkpoint) -> None:
    """No road leads from a quantized checkpoint to ONNX."""
    from diablo_export.converters.onnx_graph import check_float

    check_float(source)


def _for_packed(method: str | None, calibration: Any) -> str:
    """The method for a Hugging Face checkpoint that is quantized."""
    if calibration is not None or method not in (None, "refit", "rtn"):
        raise InputError(
            "a quantized Hugging Face checkpoint is merged by --method refit or rtn, which look at no text; the others "
            "run the float model: give that, and --quantize int4"
        )
    return method or "refit"


def _for_onnx(
    source: onnx_file.OnnxModel, adapter: Adapter, method: str | None, calibration: Any, reference: str | Path | None
) -> tuple[str, str | Path | None]:
    """The method for an ONNX model, and its reference in torch."""
    import onnx_ir as ir

    from diablo_export.converters.onnx_linears import linears

    layers = linears(ir.load(source.file))
    warn_of_another([adapter], grids(layers))
    bits = {layer.bits for layer in layers if layer.bits}
    if not bits:
        _refuse_unused(method, calibration, f"{source.file} holds no quantized weights")
        return "exact", None
    chosen = method or ("auto" if min(bits) <= 4 else "rtn")
    if chosen == "rtn":
        return "rtn", None
    named = reference or adapter.base_model
    try:
        if named is None:
            raise CheckpointError("the adapter does not name its base")
        checkpoint = Checkpoint.open(named)
        adapter.check_base(checkpoint)
        chosen = _if_it_fits(checkpoint, chosen, given=method is not None)
        _load(chosen)
    except InputError as error:
        if method is not None or reference is not None:
            raise InputError(
                f"--method {chosen} runs the float model that {source.file.name} was made from, which cannot be used: "
                f"{error}. Give it as --reference, or choose --method rtn"
            ) from error
        log.warning(
            "rounded to the nearest, and what is left of the fine-tune not measured: the float model cannot be used "
            "(%s). Give it as --reference to keep the fine-tune", error,
        )  # fmt: skip
        chosen = "rtn"
    return chosen, None if chosen == "rtn" else named


def _refuse_unused(method: str | None, calibration: Any, why: str) -> None:
    """Nothing is rounded, so nothing needs a method."""
    if method is not None or calibration is not None:
        raise InputError(f"--method and --calibration are for quantized weights, and {why}; leave them out")


def _if_it_fits(source: Checkpoint, method: str, given: bool) -> str:
    """The method, or rtn where the model does not fit in memory in torch and nobody asked for another."""
    from diablo_export.converters.sizes import memory_fault

    fault = None if method == "rtn" else memory_fault(source)
    if fault and given:
        raise InputError(f"--method {method}: {fault}; use a machine with more memory, or --method rtn")
    if fault:
        log.warning("rounded to the nearest, and what is left of the fine-tune not measured: %s", fault)
    return "rtn" if fault else method


def _load(method: str) -> None:
    """Import the C++ libraries that the work ahead needs: before an output folder is begun."""
    from diablo_export.converters.onnx_graph import load_exporters

    load_exporters()
    if method != "rtn":
        import diablo_export.converters.grid_merge  # noqa: F401


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
    source: onnx_file.OnnxModel, adapter: Adapter, folder: Path, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge into a copy of an ONNX model; the modules' entries, and the rest of the manifest."""
    import onnx_ir as ir

    from diablo_export.converters.onnx_linears import kind, linears
    from diablo_export.converters.onnx_merge import onnx_merge
    from diablo_export.runtime import session

    more: dict[str, Any] = {"hashes": {}, "read": onnx_file.copy(source, folder)}
    if options["method"] in ("exact", "rtn"):
        modules = onnx_merge(folder / onnx_file.MODEL, adapter)
    else:
        from diablo_export.converters.grid_merge import grid_merge

        modules, more["survival"] = grid_merge(folder, adapter, **options)
    if (folder / onnx_file.MODEL).read_bytes() != source.file.read_bytes():
        session(folder / onnx_file.MODEL)  # a graph that the runtime refuses is no merge
    reason = f"{source.file.name} is an ONNX model already"
    return modules, {"exporter": "given", "reason": reason, **kind(linears(ir.load(source.file))), **more}


def _to_hf(
    model: str | Path, adapter: Adapter, folder: Path, method: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge into a checkpoint; the modules' entries, and the rest of the manifest."""
    from diablo_export.converters.hf_merge import hf_merge

    done = hf_merge(model, adapter, folder, method)
    reason = "a Hugging Face checkpoint was asked for, or is what an unquantized merge gives"
    more = {"hashes": done.hashes, "read": done.base, "exporter": "hf", "reason": reason}
    bits = min((entry["bits"] for entry in done.modules if "bits" in entry), default=None)
    return done.modules, more | ({} if bits is None else {"quantize": f"int{bits}"})


def _to_onnx(
    model: str | Path,
    adapter: Adapter,
    folder: Path,
    quantize: str,
    group_size: int,
    asymmetric: bool,
    precision: str,
    options: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Build the graph, the blocks added on the way or merged after; the modules' entries, and the manifest's rest."""
    from diablo_export.converters.onnx_graph import build_graph

    on_grid = adapter.base_grid is not None and adapter.base_grid.on_grid and quantize != "none"
    at_once = options["method"] in ("exact", "rtn") and not on_grid
    built = build_graph(
        model, folder, task=_task(adapter), quantize=quantize, group_size=group_size, symmetric=not asymmetric,
        precision=precision, merged=adapter if at_once else None, head=adapter,
    )  # fmt: skip
    lost = [name for name in adapter.modules if name not in built.modules]
    if lost:
        raise ExportError(
            f"{model}: the {built.exporter} exporter's graph has no node for {len(lost)} adapted modules, so their "
            f"blocks would be lost: {', '.join(lost)}. Merge to Hugging Face (--format hf) instead"
        )
    more: dict[str, Any] = {"hashes": built.hashes, "exporter": built.exporter, "reason": built.reason}
    if at_once:
        return [
            {"name": name, **built.modules[name], "action": "merged", "why": _why(quantize)} for name in adapter.modules
        ], more
    more["hashes"] = {}
    if options["method"] == "rtn":
        from diablo_export.converters.onnx_merge import onnx_merge

        done = onnx_merge(folder / onnx_file.MODEL, adapter)
    else:
        from diablo_export.converters.grid_merge import grid_merge

        # an adapter that was trained on the grid was so beside its float head
        how = {"float_base": Checkpoint.open(model), "has_head": not on_grid, **options}
        done, more["survival"] = grid_merge(folder, adapter, **how)
    return [{**built.modules[entry["name"]], **entry} for entry in done], more


def _why(quantize: str) -> str:
    return "added to the weight" + ("" if quantize == "none" else f", the sum then rounded to {quantize}")


def _task(adapter: Adapter) -> str:
    return next(option for option, kind in TASKS.items() if kind == adapter.task_type)
