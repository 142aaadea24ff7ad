"""The verb `merge`: an adapter's blocks into the weights of its base, to Hugging Face or to ONNX."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diablo_export.adapter import Adapter
from diablo_export.algorithms import ALGORITHMS, Algorithm
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import merge_method, onnx_file
from diablo_export.converters.base import hashing
from diablo_export.converters.rounding import lossy, warn_of_rounding
from diablo_export.converters.sizes import check_options, checkpoint_bytes, onnx_bytes
from diablo_export.converters.trained_grid import numbers, output_grid, warn_of, warn_of_another
from diablo_export.errors import ExportError, InputError
from diablo_export.manifest import adapter_entry, write_manifest
from diablo_export.output import check_output, keep_inputs, new_folder

if TYPE_CHECKING:
    from diablo_export.converters.onnx_graph import Graph
    from diablo_export.converters.planned_merge import Rebuild

FORMATS = ("onnx", "hf")
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
    plan: str | Path | None = None,
    max_bytes: int | None = None,
    picture: str | Path | None = None,
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
        method: how quantized weights take the blocks, see docs/merging.md: rtn, refit, calibrated, distilled,
            layerwise; or k_quant, hqq, gptq, learned, by which every weight of a float model is quantized with the
            blocks in it; or auto, the best of the quick ones, and distilled where these do not keep `min_survival`.
            None: auto for 4 bits and fewer, rtn for 8; refit for a Hugging Face checkpoint that is quantized already,
            which takes that or rtn.
        calibration: data to measure and calibrate on; None: text that the tuned model writes.
        reference: the float model that an ONNX model was made from, Hugging Face folder or id; None: what the
            adapter names as its base.
        min_survival: least cosine of what the adapter does to the logits with what it should do; its gain may be
            as far from 1.
        max_seconds: about what a method other than rtn may take.
        plan: auto: decide module by module between a merge at the bits asked for, a merge at 8 bits and a branch, for
            the least size and time that keep `min_survival`; or the plan.toml of an earlier merge, to be done again.
        max_bytes: of the ONNX model and its data, at most; for `auto`.
        picture: a .png or .svg file for what each method that was tried keeps of each module.
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
    keep_inputs(output, model, adapter, calibration, reference)
    check_output(output, overwrite)
    merge_method.check_values(method, calibration, min_survival, max_seconds, plan, max_bytes, seed)
    check_options(quantize, group_size, asymmetric, precision)
    chosen = _format(format, quantize, precision)
    given = Adapter.load(adapter)
    task = given.task
    warn_of(given)
    group_size, usual = output_grid([given], quantize, group_size, asymmetric)
    asymmetric = merge_method.zero_points(method, asymmetric, usual)
    source = onnx_file.find(model) or Checkpoint.open(model)
    if isinstance(source, onnx_file.OnnxModel):
        chosen = _as_it_is(source, format, quantize, precision)
        how, reference = merge_method.for_onnx(source, given, method, calibration, reference, plan)
        needs = source.size
    else:
        how = merge_method.for_checkpoint(source, quantize, method, calibration, reference, plan)
        needs, reference = _room(source, chosen, quantize, group_size, precision), model if chosen == "onnx" else None
        if not source.config.get("quantization_config"):  # of that the merge speaks
            warn_of_another([given], [numbers(quantize, group_size, asymmetric)])
    made = isinstance(source, Checkpoint) and chosen == "onnx"
    measured = chosen == "onnx" and (plan is not None or how not in ("exact", "rtn"))
    if made or measured:
        merge_method.load(how if plan is None else "auto")
    merge_method.check_picture(picture, how if not measured or how == merge_method.LAYERWISE else None)
    laid = {"quantize": quantize, "group_size": group_size, "asymmetric": asymmetric, "precision": precision}
    options: dict[str, Any] = {"method": how, "min_survival": min_survival, "max_seconds": max_seconds, "seed": seed}
    options |= {"plan": plan, "max_bytes": max_bytes, "calibration": calibration, "reference": reference}
    said = {"model": str(model), "adapter": str(adapter), "format": chosen, **laid, **options}
    said |= {name: said[name] and str(said[name]) for name in ("plan", "calibration", "reference")}
    files = source.files if made else []  # other merges hash what they read
    with new_folder(output, overwrite, needs) as folder, hashing(model, source.folder, files) as base:
        modules, more = _merged(source, model, given, folder, chosen, laid, options)
        hashes, read = more.pop("hashes"), base(more.pop("read", {}))
        more = {"task": task, "format": chosen, "quantize": quantize, "precision": precision} | more
        entries = [adapter_entry(Path(adapter).resolve().name, given)]
        manifest = write_manifest(folder, "merge", said, read, entries, modules, hashes, **more)
    if picture is not None:
        _draw(manifest, picture, f"{Path(adapter).resolve().name} merged into {Path(output).name}")
    return manifest


def _merged(
    source: onnx_file.OnnxModel | Checkpoint,
    model: str | Path,
    adapter: Adapter,
    folder: Path,
    format: str,
    laid: dict[str, Any],
    options: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge, by the road that source and format call for; the modules' entries, and the rest of the manifest."""
    if isinstance(source, onnx_file.OnnxModel):
        return _into_onnx(source, adapter, folder, options)
    if format == "hf":
        return _to_hf(model, adapter, folder, options["method"])
    adapter.check_base(source)
    return _to_onnx(source, adapter, folder, laid, options)


def _draw(manifest: dict[str, Any], picture: str | Path, title: str) -> None:
    from diablo_export.measure.survival_picture import draw, rows

    draw(rows(manifest["survival"]), picture, title)


def _room(source: Checkpoint, chosen: str, quantize: str, group_size: int, precision: str) -> int:
    """Bytes that the output will take."""
    if chosen == "hf":
        return checkpoint_bytes(source)
    from diablo_export.converters.onnx_graph import check_float

    check_float(source)  # no road leads from quantized weights to a merge in ONNX
    return onnx_bytes(source, quantize, group_size, precision)


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
    onnx_file.refuse_adapted(source)
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
    from diablo_export.converters.onnx_linears import kind, linears
    from diablo_export.converters.onnx_rewrite import merged_copy
    from diablo_export.converters.onnx_trial import try_merged

    reason = f"{source.file.name} is an ONNX model already"
    more: dict[str, Any] = {"exporter": "given", "reason": reason, "hashes": {}, **kind(linears(source.graph))}
    if options["method"] in ("exact", "rtn") and options["plan"] is None:
        modules, more["read"], more["hashes"] = merged_copy(source, folder, adapter)
    else:
        more["read"] = onnx_file.copy(source, folder)
        modules, more["survival"] = _measured(folder, adapter, options)
    if (folder / onnx_file.MODEL).read_bytes() != source.file.read_bytes():
        try_merged(source.file, folder / onnx_file.MODEL)
    return modules, more


def _measured(
    folder: Path,
    adapter: Adapter,
    options: dict[str, Any],
    *,
    float_base: Checkpoint | None = None,
    has_head: bool = False,
    rebuild: Rebuild | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge into the model in `folder` by a method that measures, or by a plan; the entries, and the survival."""
    by_plan = {name: options[name] for name in ("plan", "max_bytes")}
    rest = {name: value for name, value in options.items() if name not in (*by_plan, "method")} | {"has_head": has_head}
    if options["method"] == merge_method.LAYERWISE:
        from diablo_export.converters.layer_merge import layer_merge

        return layer_merge(folder, adapter, **rest)
    rest |= {"method": options["method"], "float_base": float_base}
    if options["plan"] is None:
        from diablo_export.converters.grid_merge import grid_merge

        return grid_merge(folder, adapter, **rest)
    from diablo_export.converters.planned_merge import planned_merge

    return planned_merge(folder, adapter, rebuild=rebuild, **by_plan, **rest)


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
    source: Checkpoint, adapter: Adapter, folder: Path, laid: dict[str, Any], options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Build the graph, the blocks added on the way or merged after; the modules' entries, and the manifest's rest."""
    if options["method"] in ALGORITHMS:
        return _by_algorithm(source, adapter, folder, laid, options)
    on_grid = adapter.base_grid is not None and adapter.base_grid.on_grid and laid["quantize"] != "none"
    plain = options["method"] in ("exact", "rtn") and options["plan"] is None
    built = _built(source, adapter, folder, laid, merged=adapter if plain and not on_grid else None)
    more: dict[str, Any] = {"hashes": built.hashes, "exporter": built.exporter, "reason": built.reason}
    if plain and not on_grid:
        entry = {"action": "merged", "why": _why(laid["quantize"])}
        modules = [{"name": name, **built.modules[name], **entry} for name in adapter.modules]
        way = "take --precision fp32, or keep the blocks as a branch: diablo-export export"
        warn_of_rounding(lossy(modules), "float16", way)
        return modules, more
    more["hashes"] = {}
    if plain:
        from diablo_export.converters.onnx_merge import onnx_merge

        done = onnx_merge(folder / onnx_file.MODEL, adapter)
    else:
        from diablo_export.converters.onnx_graph import remove

        def rebuild(merged: Adapter, wide: Collection[str]) -> Mapping[str, Mapping[str, Any]]:
            remove(list(folder.iterdir()))  # and not overwritten: what is mapped stays as it is
            return _built(source, adapter, folder, laid, merged=merged, wide=wide).modules

        # an adapter that was trained on the grid was so beside its float head
        how: dict[str, Any] = {"float_base": source, "has_head": not on_grid, "rebuild": rebuild}
        done, more["survival"] = _measured(folder, adapter, options, **how)
    return [{**built.modules[entry["name"]], **entry} for entry in done], more


def _by_algorithm(
    source: Checkpoint, adapter: Adapter, folder: Path, laid: dict[str, Any], options: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Merge in float and quantize every weight by a whole algorithm; as `_to_onnx`."""
    from diablo_export.converters.float_road import float_road

    def build(algorithm: Algorithm) -> Graph:
        return _built(source, adapter, folder, laid, merged=adapter, algorithm=algorithm)

    rest = {name: value for name, value in options.items() if name not in ("plan", "max_bytes", "reference")}
    built, modules, survival = float_road(folder, adapter, source, build, **rest)
    said = {"hashes": built.hashes, "exporter": built.exporter, "reason": built.reason}
    return modules, {**said, "survival": survival}


def _built(source: Checkpoint, adapter: Adapter, folder: Path, laid: dict[str, Any], **what: Any) -> Graph:
    """The model's graph in `folder`, with the adapter's head; every adapted module must be in it."""
    from diablo_export.converters.onnx_graph import build_graph

    grid = {"quantize": laid["quantize"], "group_size": laid["group_size"], "symmetric": not laid["asymmetric"]}
    built = build_graph(
        source.folder, folder, task=adapter.task, precision=laid["precision"], head=adapter, **grid, **what
    )
    lost = [name for name in adapter.modules if name not in built.modules]
    if lost:
        raise ExportError(
            f"{source.folder}: the {built.exporter} exporter's graph has no node for {len(lost)} adapted modules, so "
            f"their blocks would be lost: {', '.join(lost)}. Merge to Hugging Face (--format hf) instead"
        )
    return built


def _why(quantize: str) -> str:
    return "added to the weight" + ("" if quantize == "none" else f", the sum then rounded to {quantize}")
