"""Make one node of an int4 layer and the branch behind it: MatMulNBits + BlockDiagMatMul → MatMulNBitsBlockDiag.

For sessions on CUDA with the kernel library, which has a kernel for the two; on any other ONNX Runtime the node runs as
its function, the same two nodes as before. On the CPU with the library it is slower than the two: there MatMulNBits
packs its weights once, which it cannot do when it is called from within a kernel.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from diablo_export import opschema
from diablo_export.converters.onnx_linears import attribute
from diablo_export.errors import ExportError

_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # what the kernel multiplies in
_DEFAULTS = {"bits": 4, "accuracy_level": 0}  # MatMulNBits' own


def fuse_file(source: str | Path, target: str | Path) -> dict[str, str]:
    """Write `source`, an exported int4 graph, with its layers fused; weights stay in the files where they are.

    Args:
        source: the .onnx file.
        target: another one, in the same folder, as both name the same external files.

    Returns:
        By name of the branch node: "fused", or why it was left as it is.

    Raises:
        ExportError: the target is in another folder, or nothing could be fused.
    """
    source, target = Path(source), Path(target)
    if source.resolve().parent != target.resolve().parent:
        raise ExportError(f"{target}: not in the folder of {source.name}, whose external files it names as well")
    model = ir.load(source)
    done = fuse(model)
    if "fused" not in done.values():
        reasons = "\n".join(f"  {name}: {why}" for name, why in done.items()) or "  there are no branches"
        raise ExportError(f"{source}: nothing to fuse:\n{reasons}")
    ir.save(model, target)
    return done


def fuse(model: ir.Model) -> dict[str, str]:
    """Fuse every branch that stands directly behind its layer, in place; returns what happened to each, by node."""
    done: dict[str, str] = {}
    for node in list(model.graph):
        if node.domain == opschema.DOMAIN and node.op_type in (opschema.NAME, opschema.NAME_INT8):
            why = _obstacle(node)
            if not why:
                _replace(model, node)
            done[node.name or ""] = why or "fused"
    if "fused" in done.values():
        function = ir.from_proto(opschema.fused_function(model.opset_imports.get("", opschema.MIN_OPSET)))
        assert isinstance(function, ir.Function)
        model.functions[function.identifier()] = function
        model.opset_imports["com.microsoft"] = 1
    return done


def _obstacle(branch: ir.Node) -> str:
    """Why this branch cannot be one node with what is before it; empty where it can."""
    if branch.op_type != opschema.NAME:
        return "int8 blocks: the kernel takes blocks of X's type"
    x, blocks, y0 = branch.inputs
    layer = y0.producer() if y0 is not None else None
    if layer is None or layer.op_type != "MatMulNBits" or y0 is None:
        return f"behind {layer.op_type if layer else 'an input'}, not MatMulNBits"
    if len(list(y0.uses())) != 1 or y0.is_graph_output():
        return "somebody else reads the layer's output"
    if any(value is not None for value in layer.inputs[3:]):
        return "the layer has zero points, an order of groups or a bias"
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
    x, blocks, y0 = branch.inputs
    layer = y0.producer() if y0 is not None else None
    assert layer is not None
    given = [ir.AttrInt64(name, attribute(layer, name, _DEFAULTS.get(name, 0))) for name in opschema.ATTRIBUTES_FUSED]
    fused = ir.Node(
        opschema.DOMAIN,
        opschema.NAME_FUSED,
        [x, layer.inputs[1], layer.inputs[2], blocks],
        given,
        name=layer.name,
        metadata_props=branch.metadata_props,
    )
    ir.convenience.replace_nodes_and_values(
        model.graph, branch, [branch, layer], [fused], branch.outputs, fused.outputs
    )
