"""The verb `export`: a model and adapters to an ONNX folder that keeps the blocks as branches to be fed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from diablo_export.adapter import TASKS, Adapter
from diablo_export.block_storage import BASE_KEY
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import genai_library, onnx_file, onnx_web
from diablo_export.converters.add_adapter import add_adapters
from diablo_export.converters.base import hashing
from diablo_export.converters.onnx_adapters import (
    ENDING,
    FOLDER,
    check_classes,
    storage_errors,
    tensors,
    write_onnx_adapter,
)
from diablo_export.converters.onnx_branch import BLOCK_DTYPES, add_branches
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_graph import Graph, build_graph, load_exporters
from diablo_export.converters.onnx_head import feed_parameters
from diablo_export.converters.onnx_linears import kind, linears
from diablo_export.converters.onnx_match import Match, match
from diablo_export.converters.sizes import check_options, onnx_bytes
from diablo_export.converters.trained_grid import grids, numbers, output_grid, warn_of, warn_of_another
from diablo_export.errors import AdapterError, InputError, MatchError
from diablo_export.manifest import adapter_entry, write_manifest
from diablo_export.output import check_output, keep_inputs, new_folder
from diablo_export.packed.modules import check_base
from diablo_export.runtime import session

Given = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
TARGETS = ("ort", "web")
_DEFAULTS = ("none", None, None, "fp32", None, "ort", None)  # of the options that make the graph
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def export(
    model: str | Path,
    adapter: Given,
    output: str | Path,
    *,
    quantize: str = "none",
    group_size: int | None = None,
    asymmetric: bool | None = None,
    precision: str = "fp32",
    block_dtype: str | None = None,
    for_: str = "ort",
    custom_ops_library: str | Path | None = None,
    add: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an ONNX folder whose graph is the base and can be fed each adapter's blocks.

    Args:
        model: Hugging Face folder or id, float or quantized, or an ONNX file or folder (float, or int4 and int8 as
            MatMulNBits). Of a quantized folder the codes are kept, where MatMulNBits has them, else it becomes float.
        adapter: one adapter folder, several, or name → folder; also strings NAME=FOLDER. The name of a
            folder given alone is the folder's.
        output: the folder to write.
        quantize: none, int8, int4 or int2: the base's linear layers. The blocks do not change with it.
        group_size: input positions that share a scale, when quantizing; None: those that the first adapter was trained
            beside, or what `base_grid.usual` says of the task.
        asymmetric: a zero point for each group, when quantizing; None: likewise.
        precision: fp32 or fp16, of everything that is not quantized.
        block_dtype: fp32, fp16 or int8 (with a scale for each block): how blocks are stored and fed, at half or a
            quarter of float32's bytes. None: in each layer's own float type. The manifest says per module how far
            they are from the trained ones.
        for_: ort, or web: for onnxruntime-web and onnxruntime-node, which feed plain inputs only. The blocks are then
            inputs of every run, and adapters are safetensors files.
        custom_ops_library: kernel library to put into the folder and name in genai_config.json, for onnxruntime-genai:
            a path, or auto for this installation's. None: no file names a library; `runtime.session` finds its own.
        add: put the adapters into `output`, an export of the same base: nothing else of it changes, so no other
            option is taken. Parity has to be checked again.
        overwrite: replace `output` if it exists; with `add`, adapters that are there under the same names.

    Returns:
        The manifest.

    Raises:
        AdapterError: an adapter that cannot be read, or belongs to another base.
        MatchError: adapted modules that the graph does not show. ExportError: a model that no road can take.
        OutputError: `output` exists, is not writable, or there is no room.
    """
    if add:
        graph = (quantize, group_size, asymmetric, precision, block_dtype, for_, custom_ops_library)
        return _add(model, adapter, Path(output), graph, overwrite)
    keep_inputs(output, model, *(folder for _, folder in _pairs(adapter)))
    check_output(output, overwrite)
    check_options(quantize, group_size, asymmetric, precision)
    _check_block_dtype(block_dtype, precision)
    adapters = load_adapters(adapter)
    web = _is_web(for_, adapters)
    if web and custom_ops_library is not None:
        raise InputError("--custom-ops-library is for onnxruntime-genai; it does not run exports for web: leave it out")
    library = genai_library.find(custom_ops_library)
    task = _one_task(adapters)
    group_size, asymmetric = output_grid(adapters.values(), quantize, group_size, asymmetric)
    laid = {"quantize": quantize, "group_size": group_size, "asymmetric": asymmetric, "precision": precision}
    source = onnx_file.find(model) or _checkpoint(model, adapters)
    needs = _room(source, quantize, group_size, precision) + sum(4 * one.parameters for one in adapters.values())
    with new_folder(output, overwrite, needs) as folder, hashing(model, source.folder, source.files) as base:
        built, what = _built(source, model, adapters, folder, task, laid)
        if library is not None:
            genai_library.write(folder, library)
        known = base()
        modules, mark = _branch(folder, adapters, known["sha256"], block_dtype, web)
        hashes = {name: value for name, value in built.hashes.items() if name != MODEL}  # that one has changed since
        folders = {name: str(one.path) for name, one in adapters.items()}
        options = {"model": str(model), "adapter": folders, **laid, "block_dtype": block_dtype, "for": for_}
        options |= {"custom_ops_library": str(library) if library else None}
        entries = [_entry(name, one, web) for name, one in adapters.items()]
        what |= {"for": for_, BASE_KEY: mark}
        if web:
            what |= {"no_adapter": _file(onnx_web.NO_ADAPTER, web)}
        return write_manifest(
            folder, "export", options, known, entries, modules, hashes, task=task, exporter=built.exporter,
            reason=built.reason, **what,
        )  # fmt: skip


def _add(model: str | Path, given: Given, folder: Path, graph: tuple[Any, ...], overwrite: bool) -> dict[str, Any]:
    """Add adapters to an export that is there; `graph` is what was asked of a new one."""
    if graph != _DEFAULTS:
        raise InputError(f"add: {folder} keeps its graph as it is; give no option but model, adapter and output")
    adapters = load_adapters(given)
    source = onnx_file.find(model) or _checkpoint(model, adapters)
    found = source if isinstance(source, onnx_file.OnnxModel) else None
    return add_adapters(found, model, (source.folder, source.files), adapters, folder, overwrite=overwrite)


def load_adapters(given: Given) -> dict[str, Adapter]:
    """The adapters by name: a folder alone is named after itself, NAME=FOLDER and mappings say the name.

    Raises:
        AdapterError: one of them cannot be read. InputError: a name twice, or one that makes no file name.
    """
    pairs = _pairs(given)
    if not pairs:
        raise InputError("no adapter was given; give at least one adapter folder")
    names = [name for name, _ in pairs]
    bad = [name for name in names if not _NAME.fullmatch(name)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if bad:
        raise InputError(
            f"adapter name {bad[0]!r}: use letters, digits, '.', '_' and '-': it becomes a file name; give NAME=FOLDER"
        )
    if twice:
        raise InputError(f"adapter name {twice[0]!r} was given twice; name them apart with --adapter NAME=FOLDER")
    adapters = {name: Adapter.load(folder) for name, folder in pairs}
    for one in adapters.values():
        warn_of(one)
    return adapters


def _pairs(given: Given) -> list[tuple[str, Path]]:
    if isinstance(given, Mapping):
        return [(name, Path(folder)) for name, folder in given.items()]
    pairs = []
    for one in [given] if isinstance(given, str | Path) else given:
        name, equals, folder = str(one).partition("=")
        alone = not equals or Path(one).exists()  # a folder may have "=" in its name
        pairs.append((Path(one).resolve().name, Path(one)) if alone else (name, Path(folder)))
    return pairs


def _one_task(adapters: Mapping[str, Adapter]) -> str:
    """The task of all the adapters, as the option spells it."""
    kinds = {one.task_type for one in adapters.values()}
    spelled = {kind: option for option, kind in TASKS.items()}
    if len(kinds) > 1 or not kinds <= spelled.keys():
        shown = ", ".join(f"{name}: {one.task_type}" for name, one in adapters.items())
        raise AdapterError(f"one folder holds adapters of one task, {' or '.join(spelled)}; given are {shown}")
    heads = {tuple(sorted((name, value.shape) for name, value in one.saved.items())) for one in adapters.values()}
    if len(heads) > 1:
        shown = "; ".join(f"{n}: {[(p, v.shape) for p, v in one.saved.items()]}" for n, one in adapters.items())
        raise AdapterError(f"adapters in one folder must have heads of the same shapes; given are {shown}")
    for name, one in adapters.items():
        check_classes(name, one, next(iter(adapters.values())).labels)
    return spelled[kinds.pop()]


def _checkpoint(model: str | Path, adapters: Mapping[str, Adapter]) -> Checkpoint:
    """The base's checkpoint, which every adapter was trained on."""
    checkpoint = Checkpoint.open(model)
    for adapter in adapters.values():
        check_base(checkpoint, adapter)
    return checkpoint


def _check_given(given: onnx_file.OnnxModel, quantize: str, precision: str) -> None:
    if (quantize, precision) != ("none", "fp32"):
        raise InputError(
            f"{given.file}: is ONNX already and is taken as it is; leave out --quantize and --precision, or give "
            "the Hugging Face folder"
        )
    onnx_file.refuse_adapted(given)


def _room(source: onnx_file.OnnxModel | Checkpoint, quantize: str, group_size: int, precision: str) -> int:
    """Bytes that the graph will take; refuses options that a given one does not take."""
    if isinstance(source, onnx_file.OnnxModel):
        _check_given(source, quantize, precision)
        return source.size
    load_exporters()
    return onnx_bytes(source, quantize, group_size, precision)


def _built(
    source: onnx_file.OnnxModel | Checkpoint,
    model: str | Path,
    adapters: Mapping[str, Adapter],
    folder: Path,
    task: str,
    laid: Mapping[str, Any],
) -> tuple[Graph, dict[str, str]]:
    """The base's graph in `folder`, and what it is as the manifest says it: its quantize and precision."""
    if isinstance(source, onnx_file.OnnxModel):
        layers = linears(source.graph)
        onnx_file.copy(source, folder)
        warn_of_another(adapters.values(), grids(layers))
        return Graph("given", f"{source.file.name} is an ONNX model already", {}, {}), kind(layers)
    packed = bool(source.config.get("quantization_config"))
    if not packed:  # else `check_base` has spoken of that
        wanted = numbers(laid["quantize"], laid["group_size"], laid["asymmetric"])
        warn_of_another(adapters.values(), [wanted])
    grid = {"quantize": laid["quantize"], "group_size": laid["group_size"], "symmetric": not laid["asymmetric"]}
    head, precision = next(iter(adapters.values())), laid["precision"]
    built = build_graph(model, folder, task=task, precision=precision, head=head, **grid)
    if packed:
        return built, kind(linears(ir.load(folder / MODEL)))
    return built, {"quantize": laid["quantize"], "precision": precision}


def _branch(
    folder: Path, adapters: Mapping[str, Adapter], sha256: str, block_dtype: str | None, web: bool
) -> tuple[list[dict[str, Any]], str]:
    """Give model.onnx in `folder` its branches, write the adapters beside it; returns the modules' entries and the
    base that model and adapters now name."""
    model = ir.load(folder / MODEL)
    matches: dict[str, Match] = {}
    for name, adapter in adapters.items():
        try:
            matches |= match(model, adapter.modules)
        except MatchError as error:
            raise MatchError(f"adapter {name} ({adapter.path}): {error}") from error
    entries: dict[str, dict[str, Any]] = {
        name: {**one.describe(), "action": "branch", "adapters": [n for n, a in adapters.items() if name in a.modules]}
        for name, one in matches.items()
    }
    base = model.metadata_props.setdefault(BASE_KEY, sha256)  # an ONNX base may bring its own
    fed = add_branches(model, matches, block_dtype)
    fed |= feed_parameters(model, next(iter(adapters.values())).saved)
    none = onnx_web.require_inputs(model) if web else {}
    ir.save(model, folder / MODEL)
    session(folder / MODEL)  # a graph that the runtime refuses is no export
    inputs = {name: dtype.numpy() for name, dtype in fed.items()}
    for name, adapter in adapters.items():
        values = tensors(adapter, inputs)
        for module, off in storage_errors(name, adapter, values).items():
            entries[module].setdefault("block_error", {})[name] = off
        if web:
            onnx_web.write_safetensors(folder / _file(name, web), values, base)
        else:
            write_onnx_adapter(folder / _file(name, web), values, base)
    if web:
        onnx_web.write_safetensors(folder / _file(onnx_web.NO_ADAPTER, web), none, base)
        onnx_web.leave_out_genai(folder)
    return list(entries.values()), base


def _entry(name: str, adapter: Adapter, web: bool) -> dict[str, Any]:
    return {**adapter_entry(name, adapter), "file": _file(name, web)}


def _file(name: str, web: bool) -> str:
    return f"{FOLDER}/{name}{onnx_web.ENDING if web else ENDING}"


def _check_block_dtype(block_dtype: str | None, precision: str) -> None:
    if block_dtype is not None and block_dtype not in BLOCK_DTYPES:
        raise InputError(f"block_dtype is {block_dtype!r}; choose one of {', '.join(BLOCK_DTYPES)}")
    if (block_dtype, precision) == ("fp32", "fp16"):
        raise InputError("block_dtype is fp32 beside precision fp16: blocks are at most as wide as the graph")


def _is_web(for_: str, adapters: Mapping[str, Adapter]) -> bool:
    if for_ not in TARGETS:
        raise InputError(f"for_ is {for_!r}; it is one of {', '.join(TARGETS)}")
    if for_ == "web":
        onnx_web.check_names(adapters)
    return for_ == "web"
