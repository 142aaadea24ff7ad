"""From a graph laid out on placeholders to the finished one: nodes marked, quantized, weights streamed.

Both roads end here. A road hands over the graph and, for each initializer that stands for a parameter, its `Origin`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from diablo_export.adapter import Adapter
from diablo_export.algorithms import Algorithm
from diablo_export.base_grid import BITS
from diablo_export.checkpoint import HEAD, Checkpoint
from diablo_export.console import log, progress
from diablo_export.converters.onnx_experts import quantize_experts
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_weights import Job, Source, float_job, placeholder, quantized_job, write
from diablo_export.converters.packed_view import stored_codes
from diablo_export.errors import CheckpointError, MatchError, indented
from diablo_export.opschema import MODULE, ROWS
from diablo_export.quantization import Float32, Quantized

_INLINE = 1024  # bytes; smaller constants stay in model.onnx, where every tool can see them


@dataclass(frozen=True)
class Origin:
    """Which parameter an initializer stands for, and how it lies there."""

    parameter: str  # of the Hugging Face model, such as model.layers.0.mlp.up_proj.weight
    transposed: bool = False  # a matrix stored (in_features, out_features)
    rows: tuple[int, int] | None = None  # these output rows only
    conv1d: bool = False  # the parameter itself is (in_features, out_features)
    swapped: bool = False  # experts that the parameter has as (experts, in_features, out_features)
    by_turns: bool = False  # experts whose gate and up lie row by row in turns, in the parameter above each other

    @property
    def module(self) -> str:
        """The module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Layout:
    """A graph without its large weights."""

    model: ir.Model
    origins: dict[str, Origin]  # by initializer name
    tied: dict[str, str] = field(default_factory=dict)  # parameter → the parameter whose values it shares


@dataclass(frozen=True)
class Weights:
    """Where parameters come from: the checkpoint, an adapter's blocks added, its saved head in place."""

    checkpoint: Checkpoint
    merged: Adapter | None = None
    saved: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def source(self, origin: Origin) -> Source:
        """The values of one parameter.

        Raises:
            CheckpointError: neither the checkpoint nor the adapter has them.
        """
        name = origin.parameter
        module = self.merged.modules.get(origin.module) if self.merged and name.endswith(".weight") else None
        blocks = None if module is None else module.blocks
        first = self.tied.get(name, name)  # any of the names that share values may be stored, or each for itself
        names = [name, first, *(other for other, target in self.tied.items() if target == first)]
        for each in names:
            # a new head is the head's alone, also where the base stores the embeddings under its name
            value = None if each != name and each.endswith(HEAD) else self.saved.get(each)
            stored = self.checkpoint.find(each) if value is None else value
            if stored is not None:
                return Source(stored, origin.conv1d, blocks, origin.rows, origin.swapped, origin.by_turns)
        folder = next(iter(self.checkpoint)).file.parent  # where the weights lie: a quantized model's view has another
        raise CheckpointError(
            f"{folder}: has no tensor for the parameter {name}, nor does the adapter bring it; its "
            "architecture in config.json wants it. Give the model folder that the adapter was trained on"
        )


def finish(
    layout: Layout,
    weights: Weights,
    folder: Path,
    *,
    quantize: str = "none",
    group_size: int = 32,
    symmetric: bool = True,
    accuracy_level: int = 4,
    wide: Collection[str] = (),
    algorithm: Algorithm | None = None,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Mark the modules' nodes, quantize them where asked, stream the weights and write model.onnx.

    Args:
        layout: the graph.
        weights: where its parameters come from.
        folder: where to.
        quantize, group_size, symmetric, accuracy_level, wide, algorithm: as `onnx_graph.build_graph`'s.

    Returns:
        Per module how its weight lies in the graph, and the SHA-256 of the data file.

    Raises:
        MatchError: modules to be merged that are no linear node of the graph.
    """
    graph = layout.model.graph
    _drop_unread(graph)
    named = {value: origin for name, origin in layout.origins.items() if (value := graph.initializers.get(name))}
    modules: dict[str, list[dict[str, Any]]] = defaultdict(list)
    jobs: dict[str, Job] = {}
    shared: dict[str, None] = {}
    gains: dict[str, dict[str, float]] = defaultdict(dict)  # of modules that float16 takes blocks from
    routed: set[str] = set()  # modules that have experts
    for node in [node for node in graph.all_nodes() if node.op_type == "MoE"]:
        experts = {value: named[value] for value in node.inputs if value in named}
        module = node.metadata_props[MODULE] = next(iter(experts.values())).module
        routed.add(_outer(module))
        if quantize != "none":
            sources = {value: weights.source(origin) for value, origin in experts.items()}
            how: Any = {"bits": BITS[quantize], "group_size": group_size, "symmetric": symmetric}
            made = quantize_experts(graph, node, module, sources, **how, accuracy_level=accuracy_level)
            jobs |= {job.initializers[0].name or "": job for job in made}

    def grid_of(source: Source, module: str) -> _Grid | None:
        if (packed := stored_codes(source)) is not None:
            stored = packed.bits, packed.group_size, packed.zero_points is None
            return _Grid(*stored, by=partial(_stored_codes, source))
        if quantize == "none" or _outer(module) in routed:  # which expert it is to be is no matter of 4 bits
            return None
        bits = 8 if module in wide else BITS[quantize]
        if algorithm is None:
            return _Grid(bits, group_size, symmetric)
        by = partial(algorithm.quantize, module, bits, group_size, symmetric)
        return _Grid(bits, group_size, *algorithm.kind(symmetric), by)

    for node, weight, origin in [(node, *found) for node in graph.all_nodes() if (found := linear_weight(node, named))]:
        source, module = weights.source(origin), origin.module
        _mark(node, origin)
        alone = len(weight.consumers()) == 1 and node.op_type == "MatMul"
        grid = grid_of(source, module) if alone else None
        if grid is not None:
            entry, job = _quantize(graph, node, weight, source, grid)
            node.attributes.add(ir.AttrInt64("accuracy_level", accuracy_level))
        else:
            shared |= {} if quantize == "none" or alone or _outer(module) in routed else {module: None}
            entry, job = _plain(node, weight, origin, replace(source, kept=gains[module]))
        modules[module].append(entry | {"rows": list(origin.rows) if origin.rows else None})
        jobs[weight.name or ""] = job
    if shared:
        log.warning("not quantized, as several nodes compute with the same weight: %s", ", ".join(shared))
    _check_all_merged(weights.merged, modules)
    jobs |= _other_parameters(graph, named, weights, jobs, narrow=quantize != "none")
    digest = _write(layout.model, [*jobs.values(), *_constants(layout, jobs)], folder)
    entries = {name: parts[0] if len(parts) == 1 else {"parts": parts} for name, parts in modules.items()}
    return {name: entry | gains[name] for name, entry in entries.items()}, digest


def _other_parameters(
    graph: ir.Graph, named: Mapping[ir.Value, Origin], weights: Weights, done: Mapping[str, Job], narrow: bool
) -> dict[str, Job]:
    """The jobs of parameters that are no linear layer's weight; `narrow` embeddings keep 16 bits."""
    jobs = {}
    for value, origin in named.items():
        if narrow:
            _keep_16_bits(graph, value, weights.source(origin))
        if value.name not in done and value.is_initializer():
            jobs[value.name or ""] = float_job(value, weights.source(origin), origin.transposed)
    return jobs


@dataclass(frozen=True)
class _Grid:
    """How one weight is quantized.

    Attributes:
        bits: of a code.
        group_size: input positions that share a scale.
        symmetric: no zero points.
        between: zero points lie between the codes.
        by: quantizes the whole weight; None: each weight to the nearest.
    """

    bits: int
    group_size: int
    symmetric: bool
    between: bool = False
    by: Callable[[Float32], Quantized] | None = None


def _mark(node: ir.Node, origin: Origin) -> None:
    """Say on a node which module it is, and which rows of it."""
    node.metadata_props[MODULE] = origin.module
    if origin.rows:
        node.metadata_props[ROWS] = f"{origin.rows[0]}:{origin.rows[1]}"


def _outer(module: str) -> str:
    """The module that has this one."""
    return module.rpartition(".")[0]


def _stored_codes(source: Source, weight: Float32) -> Quantized:
    """The codes that the source has; read again, so that those of all weights are not held."""
    found = stored_codes(source)
    assert found is not None
    return found


def linear_weight(node: ir.Node, named: Mapping[ir.Value, Origin]) -> tuple[ir.Value, Origin] | None:
    """The weight of a linear layer's node and its origin; None for any other node."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "":
        return None
    weight = node.inputs[1]
    origin = named.get(weight) if weight is not None else None
    return (weight, origin) if weight is not None and origin is not None else None


def _check_all_merged(merged: Adapter | None, modules: Mapping[str, Any]) -> None:
    lost = [name for name in (merged.modules if merged else ()) if name not in modules]
    if lost:
        shown = indented((f"{name}: no linear node of the graph is this module" for name in lost), 20)
        raise MatchError(
            f"{len(lost)} of the adapter's modules cannot be merged into this graph:\n{shown}\n"
            f"the graph has {', '.join(list(modules)[:4])}, …; `diablo-export inspect` lists them all"
        )


def _drop_unread(graph: ir.Graph) -> None:
    """Remove initializers that no node reads, such as the rotary table of a kind of layer that a model has none of."""
    for name, value in list(graph.initializers.items()):
        if not value.consumers() and not value.is_graph_output():
            del graph.initializers[str(name)]


def _plain(node: ir.Node, weight: ir.Value, origin: Origin, source: Source) -> tuple[dict[str, Any], Job]:
    """Leave a node's weight in float; what float16 takes of blocks is noted in `source.kept`."""
    entry = {"node": node.name, "layout": node.op_type, "weight": weight.name, "transposed": origin.transposed}
    if source.blocks is None or weight.dtype != ir.DataType.FLOAT16:
        source = replace(source, kept=None)
    return entry, float_job(weight, source, origin.transposed)


def _quantize(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, source: Source, grid: _Grid
) -> tuple[dict[str, Any], Job]:
    """Turn a MatMul into MatMulNBits, named as onnxruntime's own quantizer names them."""
    bits, group_size = grid.bits, grid.group_size
    out_features, in_features = source.shape
    groups = -(-in_features // group_size)
    name, dtype = weight.name, weight.dtype
    codes = placeholder(graph, f"{name}_Q{bits}", ir.DataType.UINT8, (out_features, groups, group_size * bits // 8))
    scales = placeholder(graph, f"{name}_scales", dtype, (out_features, groups))
    shape = (out_features, groups if grid.between else -(-groups * bits // 8))
    stored = dtype if grid.between else ir.DataType.UINT8
    zeros = None if grid.symmetric else placeholder(graph, f"{name}_zero_points", stored, shape)
    node.op_type, node.domain, node.name = "MatMulNBits", "com.microsoft", f"{node.name}_Q{bits}"
    node.resize_inputs(3 if zeros is None else 4)
    for index, value in enumerate((codes, scales, zeros)[: 2 if zeros is None else 3], start=1):
        node.replace_input_with(index, value)
    attributes = {"K": in_features, "N": out_features, "bits": bits, "block_size": group_size}
    for key, number in attributes.items():
        node.attributes.add(ir.AttrInt64(key, number))
    del graph.initializers[str(name)]
    graph.opset_imports.setdefault("com.microsoft", 1)
    entry = {
        "node": node.name,
        "layout": "MatMulNBits",
        "weight": codes.name,
        "scales": scales.name,
        **({} if zeros is None else {"zero_points": zeros.name}),
        "bits": bits,
        "group_size": group_size,
        "symmetric": grid.symmetric,
        "transposed": False,
    }
    return entry, quantized_job(codes, scales, zeros, source, bits, group_size, grid.by)


def _keep_16_bits(graph: ir.Graph, table: ir.Value, source: Source) -> None:
    """Let an embedding keep the 16 bits of its checkpoint: looked up first, widened after. Same numbers, half the size.

    Only in quantized models, where the table can outweigh all the rest.
    """
    narrow = {"BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16}.get(source.dtype)
    wide = table.dtype
    lookups = list(table.consumers())
    if narrow is None or wide != ir.DataType.FLOAT or {node.op_type for node in lookups} != {"Gather"}:
        return
    table.dtype = narrow
    for node in lookups:
        found = node.outputs[0]
        cast = ir.node("Cast", [found], {"to": wide}, name=f"{node.name}/Cast")
        cast.outputs[0].shape, cast.outputs[0].dtype, found.dtype = found.shape, wide, narrow
        graph.insert_after(node, cast)
        for user, index in found.uses():
            if user is not cast:
                user.replace_input_with(index, cast.outputs[0])


def _constants(layout: Layout, done: Mapping[str, Job]) -> Iterator[Job]:
    """The initializers that the graph brought with it, such as rotary tables: large ones go to the data file too."""
    for value in list(layout.model.graph.initializers.values()):
        tensor = value.const_value
        if value.name in done or tensor is None or isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.nbytes < _INLINE:
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        else:
            yield float_job(value, Source(tensor.numpy()), transposed=False)


def _write(model: ir.Model, jobs: list[Job], folder: Path) -> str:
    total = sum(_nbytes(value) for job in jobs for value in job.initializers)
    with progress("writing weights", total) as advance:
        digest = write(folder, jobs, advance)
    ir.save(model, folder / MODEL)
    return digest


def _nbytes(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    return int(np.prod(value.shape.numpy(), dtype=np.int64) * value.dtype.itemsize)
