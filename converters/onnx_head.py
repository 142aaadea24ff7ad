"""Let parameters that an adapter brings whole, such as a classification head, be fed to an ONNX graph.

Each becomes an initializer under its parameter path that is also a graph input: its value stands until another
adapter's is fed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from diablo_export.blockdiag import Array
from diablo_export.converters.onnx_linears import Linear, linears
from diablo_export.converters.onnx_names import named, paths
from diablo_export.errors import ExportError, indented
from diablo_export.measure.names import parts_of


def feed_parameters(model: ir.Model, saved: Mapping[str, Array]) -> dict[str, ir.DataType]:
    """Make every parameter of `saved` an overridable initializer that holds its value; returns their types.

    Raises:
        ExportError: lists each parameter that the graph has no place for, or one of another shape.
    """
    faults: list[str] = []
    for name, value in saved.items():
        initializer = _as_it_is(model, name) or _stand_in(model, name, value)
        if initializer is None:
            faults.append(f"{name}: {_absent(model, name)}")
            continue
        assert initializer.shape is not None and initializer.dtype is not None
        if initializer.shape.numpy() != value.shape:
            faults.append(f"{name}: {list(initializer.shape.numpy())} in the graph, {list(value.shape)} in the adapter")
            continue
        initializer.const_value = ir.tensor(value.astype(initializer.dtype.numpy()), name=name)
        model.graph.inputs.append(initializer)
    if faults:
        raise ExportError(
            f"what the adapter saves beside its blocks does not fit the graph:\n{indented(faults)}\n"
            "Give the Hugging Face folder of the base: its export gets a head of the adapter's size"
        )
    model.graph.sort()
    return {name: model.graph.initializers[name].dtype or ir.DataType.FLOAT for name in saved}


def _as_it_is(model: ir.Model, name: str) -> ir.Value | None:
    """The initializer that is the parameter under its own name, stored as the parameter is."""
    found = model.graph.initializers.get(name)
    if found is None or (name.endswith("weight") and len(found.shape or ()) == 2):
        read = [layer for layer in linears(model) if layer.weight is found]
        return found if read and not any(layer.transposed for layer in read) else None
    return found


def _stand_in(model: ir.Model, name: str, value: Array) -> ir.Value | None:
    """A new initializer under the parameter's own name, read in place of whatever the exporter made of it."""
    module, _, leaf = name.rpartition(".")
    layers = linears(model)
    layer = next(iter(named(layers, module)), None)
    if layer is None and len(below := _below(layers, module)) == 1:
        layer = below[0]
    if layer is None or leaf not in ("weight", "bias"):
        return None
    shape = (layer.out_features, layer.in_features) if leaf == "weight" else (layer.out_features,)
    new = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(layer.dtype))
    new.const_value = ir.tensor(np.zeros(shape, layer.dtype.numpy()), name=name)
    if value.shape != shape:
        return new  # the caller says so
    if not (_set_weight(model, layer, new) if leaf == "weight" else _set_bias(layer, new)):
        return None
    for node in [node for node in model.graph if any(made.name == name for made in node.outputs)]:
        if not any(made.uses() or made.is_graph_output() for made in node.outputs):
            model.graph.remove(node, safe=True)  # such as the DequantizeLinear of the old one
    for unread in [value for value in model.graph.initializers.values() if not value.uses()]:
        if not unread.is_graph_input():
            del model.graph.initializers[unread.name or ""]
    model.graph.register_initializer(new)  # the old one may have had its name
    return new


def _below(layers: Sequence[Linear], module: str) -> list[Linear]:
    """The layers of the module's name below any other: that of whatever wrapped the model as it was exported."""
    path = parts_of(module)
    return [layer for layer in layers if any(other[-len(path) :] == path for other in paths(layer))]


def _absent(model: ir.Model, name: str) -> str:
    """Why the graph has no place for a parameter."""
    below = _below(linears(model), name.rpartition(".")[0])
    if len(below) < 2:
        return "no node of the graph is this module"
    return f"{len(below)} nodes could be this module: {', '.join(layer.name for layer in below)}"


def _set_weight(model: ir.Model, layer: Linear, weight: ir.Value) -> bool:
    """Let the layer multiply by `weight` (out, in), in float also where it was quantized."""
    node = layer.node
    if node.op_type == "Gemm":
        node.attributes["transB"] = ir.AttrInt64("transB", 1)
        node.replace_input_with(1, weight)
        return True
    flip = ir.Node("", "Transpose", [weight], [ir.AttrInt64s("perm", [1, 0])], name=f"{weight.name}/diablo_transpose")
    flip.outputs[0].name, flip.outputs[0].type = f"{weight.name}/diablo_transposed", ir.TensorType(layer.dtype)
    model.graph.insert_before(node, flip)
    if layer.layout == "MatMulNBits":
        node.op_type, node.domain = "MatMul", ""
        node.attributes.clear()
        node.resize_inputs(2)
    node.replace_input_with(1, flip.outputs[0])
    return True


def _set_bias(layer: Linear, bias: ir.Value) -> bool:
    """Let the layer add `bias` (out,)."""
    if layer.node.op_type == "Gemm" and len(layer.node.inputs) > 2:
        layer.node.replace_input_with(2, bias)
        return True
    for use in layer.y.uses():
        for index, value in enumerate(use.node.inputs):
            if use.node.op_type == "Add" and value is not None and value.is_initializer():
                use.node.replace_input_with(index, bias)
                return True
    return False
