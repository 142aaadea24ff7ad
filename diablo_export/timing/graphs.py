"""What a branch export is measured against: its graph without the branches, and with LoRA branches in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from diablo_export.blockdiag import Array
from diablo_export.errors import ExportError
from diablo_export.opschema import DOMAIN, input_name

_JOIN = "/diablo_join"  # how export names what joins the parts of a module for its branch


@dataclass(frozen=True)
class Branch:
    """One branch node of a graph: y = y0 + x · blockdiag(blocks)."""

    node: ir.Node
    x: ir.Value
    y0: ir.Value
    fed: list[ir.Value]  # the blocks, and their scales where they have some

    @property
    def module(self) -> str:
        """The module's path."""
        return (self.fed[0].name or "").removesuffix(input_name(""))


def branches(model: ir.Model) -> Iterator[Branch]:
    """The branch nodes of a graph, in its order."""
    for node in list(model.graph):
        if node.domain == DOMAIN:
            x, *fed, y0 = (value for value in node.inputs if value is not None)
            yield Branch(node, x, y0, fed)


def without_branches(file: Path) -> bytes:
    """A branch export's graph as it was before the branches were put in; its weights stay in their file."""
    model = ir.load(file)
    for branch in branches(model):
        _replace(model, branch, branch.y0)
    _drop_joins(model.graph)
    return _finish(model)


def with_lora(file: Path, blocks: Mapping[str, Array], seed: int = 0) -> tuple[bytes, dict[str, Array]]:
    """The same with y0 + (x · A) · B in place of each branch, in the way of onnxruntime's own LoRA adapters.

    A (in_features, rank) and B (rank, out_features) are inputs that an .onnx_adapter sets, by default of rank 0. The
    rank is the one at which they have about as many parameters as the module's blocks, and at least 1.

    Args:
        file: the branch export's model.onnx.
        blocks: of the adapter, by input name; a module without any, or with empty ones, gets rank 0.
        seed: of the random values.

    Returns:
        The model, and what to feed it by input name.

    Raises:
        ExportError: the graph does not say how wide a branch is.
    """
    model = ir.load(file)
    random = np.random.default_rng(seed)
    values: dict[str, Array] = {}
    for branch in branches(model):
        sizes, dtype = _sizes(branch), branch.x.dtype or ir.DataType.FLOAT
        given = blocks.get(input_name(branch.module))
        rank = 0 if given is None or given.size == 0 else max(1, round(given.size / sum(sizes)))
        a = _factor(model, f"{branch.module}.lora_A", (sizes[0], f"{branch.module}.rank"), dtype)
        b = _factor(model, f"{branch.module}.lora_B", (f"{branch.module}.rank", sizes[1]), dtype)
        if rank:
            for value, shape in ((a, (sizes[0], rank)), (b, (rank, sizes[1]))):
                values[value.name or ""] = random.normal(0, 0.01, shape).astype(dtype.numpy())
        down = ir.Node("", "MatMul", [branch.x, a], name=f"{branch.module}/lora_A")
        up = ir.Node("", "MatMul", [down.outputs[0], b], name=f"{branch.module}/lora_B")
        add = ir.Node("", "Add", [branch.y0, up.outputs[0]], name=f"{branch.module}/lora")
        model.graph.insert_before(branch.node, [down, up, add])
        _replace(model, branch, add.outputs[0])
    return _finish(model), values


def _sizes(branch: Branch) -> tuple[int, int]:
    sizes = [None if value.shape is None else value.shape[-1] for value in (branch.x, branch.y0)]
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        raise ExportError(f"the graph does not say how wide the input and the output of {branch.module} are")
    return sizes[0], sizes[1]


def _factor(model: ir.Model, name: str, shape: tuple[int | str, int | str], dtype: ir.DataType) -> ir.Value:
    """A matrix that can be fed, empty by default."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    empty = [size if isinstance(size, int) else 0 for size in shape]
    value.const_value = ir.Tensor(np.zeros(empty, dtype.numpy()), name=name)
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, branch: Branch, new: ir.Value) -> None:
    """Let the readers of a branch read `new`; take the branch and what fed it away."""
    _redirect(model.graph, branch.node.outputs[0], new)
    model.graph.remove(branch.node, safe=True)
    for value in branch.fed:
        if not value.uses():
            model.graph.inputs.remove(value)
            model.graph.initializers.pop(value.name or "", None)


def _redirect(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let the readers of `old` read `new`; where it is an output of the graph, so is `new`, under its name."""
    for position, output in enumerate(graph.outputs):
        if output is old:
            old.name, new.name = f"{old.name}/before", old.name
            graph.outputs[position] = new
    ir.convenience.replace_all_uses_with(old, new)


def _drop_joins(graph: ir.Graph) -> None:
    """Take away what only served the branches: a Split joined again at once, a Concat split again at once."""
    for join in [node for node in graph if node.op_type == "Concat" and (node.name or "").endswith(_JOIN)]:
        parts = [value for value in join.inputs if value is not None]
        before, after = parts[0].producer(), [use.node for use in join.outputs[0].uses()]
        if before is not None and before.op_type == "Split" and list(before.outputs) == parts:
            assert before.inputs[0] is not None
            _redirect(graph, join.outputs[0], before.inputs[0])
            graph.remove([join, before], safe=True)
        elif len(after) == 1 and after[0].op_type == "Split" and len(after[0].outputs) == len(parts):
            for output, part in zip(after[0].outputs, parts, strict=True):
                _redirect(graph, output, part)
            graph.remove([after[0], join], safe=True)


def _finish(model: ir.Model) -> bytes:
    for identifier in [each for each in model.functions if each[0] == DOMAIN]:
        del model.functions[identifier]
    model.opset_imports.pop(DOMAIN, None)
    model.graph.sort()
    return bytes(ir.to_proto(model).SerializeToString())
