"""Make one node of two or three fused layers that read the same input: MatMulNBitsBlockDiag × 3 → …Triple."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from diablo_export import opschema
from diablo_export.converters.onnx_branch import put_function
from diablo_export.converters.onnx_linears import attribute

_SHARED = ("K", "bits", "block_size", "accuracy_level")  # what the layers of a node have in common
_EACH = slice(1, 4)  # the inputs that are a layer's own: codes, scales, blocks; zero points are behind them


def join(model: ir.Model) -> dict[str, str]:
    """Join what can be joined, in place; returns by name of a fused node the others that are one node with it now."""
    done: dict[str, str] = {}
    zeros: dict[int, bool] = {}  # by how many layers a node joins: whether they have zero points, all or none
    for nodes in _families(model.graph):
        _replace(model.graph, nodes)
        zeros[len(nodes)] = len(nodes[0].inputs) > _EACH.stop
        names = [node.name or "" for node in nodes]
        done |= {name: f"joined with {' and '.join(other for other in names if other != name)}" for name in names}
    for layers, with_zeros in zeros.items():
        opset = model.opset_imports.get("", opschema.MIN_OPSET)
        put_function(model, opschema.fused_function(opset, with_zeros, layers))
    return done


def _families(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Fused nodes that one node can replace, in the graph's order, three at a time or two."""
    fused = [node for node in graph if node.domain == opschema.DOMAIN and node.op_type == opschema.NAME_FUSED]
    alike: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in fused:
        if all(v is not None and v.producer() is None for v in node.inputs[1:]):  # there before the first of them
            alike.setdefault(_kind(node), []).append(node)
    for rest in alike.values():
        while len(rest) > 1:
            count = 2 if len(rest) in (2, 4) else 3
            yield rest[:count]
            rest = rest[count:]


def _kind(node: ir.Node) -> tuple[object, ...]:
    """The same for nodes that may be joined."""
    x, scales = node.inputs[0], node.inputs[2]
    assert x is not None and scales is not None
    shared = [attribute(node, name) for name in _SHARED]
    return id(x), str(scales.dtype), len(node.inputs), *shared


def _replace(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    layers = len(nodes)
    inputs = [nodes[0].inputs[0]]
    inputs += [value for node in nodes for value in node.inputs[_EACH]]
    inputs += [value for node in nodes for value in node.inputs[_EACH.stop :]]
    names = opschema.fused_attributes(layers)
    values = {name: attribute(nodes[0], name) for name in _SHARED}
    values |= {name: attribute(node, "N") for name, node in zip(names[1 : 1 + layers], nodes, strict=True)}
    joined = ir.Node(
        opschema.DOMAIN,
        opschema.NAMES_FUSED[layers],
        inputs,
        [ir.AttrInt64(name, values[name]) for name in names],
        num_outputs=layers,
        name=" + ".join(node.name or "" for node in nodes),
        metadata_props=nodes[0].metadata_props,
    )
    outputs = [node.outputs[0] for node in nodes]
    graph.insert_before(nodes[0], joined)
    ir.convenience.replace_nodes_and_values(graph, joined, nodes, [], outputs, joined.outputs)
