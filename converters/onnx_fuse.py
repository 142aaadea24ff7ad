"""Make one node of an int4 layer and the branch behind it: MatMulNBits + BlockDiagMatMul → MatMulNBitsBlockDiag; and
one of two or three such nodes that read the same input, as q, k and v do: MatMulNBitsBlockDiagPair and …Triple.

For sessions on CUDA with the kernel library, which has a kernel for all of them in one launch; on any other ONNX
Runtime a node runs as its function, the same nodes as before. On the CPU with the library it is slower than those:
there MatMulNBits packs its weights once, which it cannot do when it is called from within a kernel.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from diablo_export import opschema
from diablo_export.converters.onnx_branch import put_function
from diablo_export.converters.onnx_join import join
from diablo_export.converters.onnx_linears import attribute
from diablo_export.errors import ExportError, indented

_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # what the kernel multiplies in
_DEFAULTS = {"bits": 4, "accuracy_level": 0}  # MatMulNBits' own
_ZEROS = 3  # its place among MatMulNBits' inputs


def fuse_file(source: str | Path, target: str | Path) -> dict[str, str]:
    """Write `source`, an exported int4 graph, with its layers fused and joined; weights stay in the files they are in.

    Args:
        source: the .onnx file.
        target: another one, in the same folder, as both name the same external files.

    Returns:
        By name of the branch node: "fused", also "joined with" the layers that read the same input, or why it was left.

    Raises:
        ExportError: the target is in another folder, or nothing could be fused.
    """
    source, target = Path(source), Path(target)
    if source.resolve().parent != target.resolve().parent:
        raise ExportError(f"{target}: not in the folder of {source.name}, whose external files it names as well")
    model = ir.load(source)
    done = fuse(model)
    if "fused" not in done.values():
        reasons = indented(f"{name}: {why}" for name, why in done.items()) or "  there are no branches"
        raise ExportError(f"{source}: nothing to fuse:\n{reasons}")
    joined = join(model)
    ir.save(model, target)
    return {name: f"fused, {joined[name]}" if name in joined else why for name, why in done.items()}


def fuse(model: ir.Model) -> dict[str, str]:
    """Fuse every branch that stands directly behind its layer, or its bias, in place.

    Returns what happened to each, by the branch node's name, which is the fused node's from then on.
    """
    kinds = (opschema.NAME, opschema.NAME_INT8)
    branches = [node for node in model.graph if node.domain == opschema.DOMAIN and node.op_type in kinds]
    done = {branch.name or "": _obstacle(branch) for branch in branches}
    fit = [branch for branch in branches if not done[branch.name or ""]]
    zeros = 2 * sum(map(_has_zeros, fit)) > len(fit)  # one function serves them all
    other = f"the layer has {'no ' if zeros else ''}zero points, unlike most of the model's"
    for branch in fit:
        alike = _has_zeros(branch) == zeros
        done[branch.name or ""] = "fused" if alike else other
        if alike:
            _replace(model, branch)
    if fit:
        put_function(model, opschema.fused_function(model.opset_imports.get("", opschema.MIN_OPSET), zeros))
        model.opset_imports["com.microsoft"] = 1
    return done


def _has_zeros(branch: ir.Node) -> bool:
    layer = _layer(branch)[0]
    return layer is not None and len(layer.inputs) > _ZEROS and layer.inputs[_ZEROS] is not None


def _layer(branch: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """What makes the branch's Y0: the layer, and the bias between them where there is one."""
    y0 = branch.inputs[-1]
    made = y0.producer() if y0 is not None else None
    if made is None or made.op_type != "Add":
        return made, None
    layers = [v.producer() for v in made.inputs if v is not None and v.const_value is None]
    return (layers[0], made) if len(layers) == 1 else (made, None)


def _obstacle(branch: ir.Node) -> str:
    """Why this branch cannot be one node with what is before it; empty where it can."""
    if branch.op_type != opschema.NAME:
        return "int8 blocks: the kernel takes blocks of X's type"
    x, blocks = branch.inputs[:2]
    layer, bias = _layer(branch)
    if layer is None or layer.op_type != "MatMulNBits":
        return f"behind {layer.op_type if layer else 'an input'}, not MatMulNBits"
    between = [layer.outputs[0], *(bias.outputs if bias is not None else [])]
    if any(len(list(value.uses())) != 1 or value.is_graph_output() for value in between):
        return "somebody else reads the layer's output"
    if any(value is not None for value in layer.inputs[_ZEROS + 1 :]):
        return "the layer has an order of groups or a bias"
    if _has_zeros(branch) and layer.inputs[_ZEROS].dtype != ir.DataType.UINT8:  # type: ignore[union-attr]
        return "zero points that are not whole numbers"
    if layer.inputs[0] is not x:
        return "the layer and the branch read different inputs"
    bits, group = attribute(layer, "bits", _DEFAULTS["bits"]), attribute(layer, "block_size")
    if bits != 4 or group % 32:
        return f"{bits} bits in groups of {group}: the kernel takes 4 bits in groups of 32 or a multiple"
    scales = layer.inputs[2]
    types = {value.dtype for value in (scales, blocks) if value is not None}
    if len(types) != 1 or not types <= set(_TYPES):
        return f"{' and '.join(sorted(str(t) for t in types))}: the kernel multiplies in float16 or bfloat16"
    return ""


def _replace(model: ir.Model, branch: ir.Node) -> None:
    x, blocks = branch.inputs[:2]
    layer, bias = _layer(branch)
    assert layer is not None
    given = [ir.AttrInt64(name, attribute(layer, name, _DEFAULTS.get(name, 0))) for name in opschema.fused_attributes()]
    inputs = [x, *layer.inputs[1:3], blocks, *(layer.inputs[_ZEROS:] if _has_zeros(branch) else [])]
    fused = ir.Node(
        opschema.DOMAIN, opschema.NAME_FUSED, inputs, given, name=branch.name, metadata_props=branch.metadata_props
    )
    made = [fused]
    if bias is not None:
        terms = [fused.outputs[0] if value is layer.outputs[0] else value for value in bias.inputs]
        made.append(ir.Node("", "Add", terms, name=bias.name, metadata_props=bias.metadata_props))
    old = [branch, *([bias] if bias is not None else []), layer]
    ir.convenience.replace_nodes_and_values(model.graph, branch, old, made, branch.outputs, made[-1].outputs)
