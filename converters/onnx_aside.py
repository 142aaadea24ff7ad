"""What a graph has beside the linear layers that are read: weights in other operators, copies, bytes in common."""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Container

import numpy as np
import onnx_ir as ir

from diablo_export import opschema
from diablo_export.converters.onnx_linears import Linear, linears_of
from diablo_export.fingerprint import SAME_WEIGHT, positions

_MULTIPLIES = ("MatMul", "Gemm", "Attention", "Einsum", "Conv", "MoE")  # part of the names of operators with weights
_PASSES = (
    "Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Constant", "QuantizeLinear",
    "DequantizeLinear",
)  # fmt: skip


def bytes_in_common(graph: ir.Graph) -> dict[str, str]:
    """Which initializers lie, in a data file, in bytes that another one lies in too, and the name of that one."""
    spans = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes:
            start = tensor.offset or 0
            spans.append((os.path.normpath(tensor.location), start, start + tensor.nbytes, str(name)))
    found: dict[str, str] = {}
    last = ("", 0, 0, "")  # of those before, the one that reaches furthest
    for span in sorted(spans):
        if span[0] == last[0] and span[1] < last[2]:
            found[span[3]] = last[3]
            found.setdefault(last[3], span[3])
        last = max(last, span, key=lambda one: (one[0], one[2]))
    return found


def in_branches(graph: ir.Graph) -> list[Linear]:
    """The linear layers inside of If, Loop and Scan, which belong to no module."""
    return [layer for branch in graph.subgraphs() for layer in linears_of(branch)]


def same_values(first: Linear, second: Linear) -> bool:
    """Whether two layers multiply by the same weight, of which one may be quantized and the other not."""
    if first.weight is second.weight:
        return True
    sizes = first.out_features, first.in_features
    if sizes != (second.out_features, second.in_features):
        return False
    one, other = (layer.values_at(*positions(*sizes)) for layer in (first, second))
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return norms > 0 and float(one @ other) / norms >= SAME_WEIGHT


def unread(graph: ir.Graph, read: Container[ir.Node]) -> str:
    """What multiplies by stored weights, and is not among the nodes `read`: "2 Attention, 24 MatMulInteger", or ""."""
    counts = Counter(label for node in graph if node not in read and (label := _multiplies(node)))
    for branch in graph.subgraphs():
        counts.update(f"{label} in branches" for node in branch if (label := _multiplies(node)))
    return ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))


def _multiplies(node: ir.Node) -> str | None:
    """The operator, where it multiplies by a weight, and what makes the weight; None for any other node."""
    if node.domain == opschema.DOMAIN or not any(name in node.op_type for name in _MULTIPLIES):
        return None
    origins = [origin for value in node.inputs if value is not None and (origin := _origin(value)) is not None]
    return f"{node.op_type} of {origins[0]}" if origins and origins[0] else node.op_type if origins else None


def _origin(value: ir.Value) -> str | None:
    """Which operator makes this of a stored matrix, "" where it is one itself; None where there is none."""
    last, producer = "", value.producer()
    while producer is not None and producer.op_type in _PASSES:
        last = last or producer.op_type
        if producer.op_type == "Constant":
            constant = producer.attributes.get("value")
            return last if constant is not None and _is_matrix(constant.as_tensor()) else None
        first = producer.inputs[0]
        if first is None:
            return None
        value, producer = first, first.producer()
    return last if producer is None and value.const_value is not None and _is_matrix(value.const_value) else None


def _is_matrix(tensor: ir.TensorProtocol) -> bool:
    return sum(size > 1 for size in tensor.shape.numpy()) > 1
