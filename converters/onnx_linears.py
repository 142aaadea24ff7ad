"""The linear layers of an ONNX graph: MatMul, Gemm and MatMulNBits on a stored weight, and that weight's values.

Values are read where they are asked for, through the memory map of the external data: looking at 64 samples of
a weight does not load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from diablo_export.blockdiag import Array
from diablo_export.errors import ExportError

Layout = Literal["MatMul", "Gemm", "MatMulNBits"]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Linear:
    """One node that multiplies by a stored weight."""

    node: ir.Node
    layout: Layout
    weight: ir.Value  # the initializer: floats, or the codes of MatMulNBits
    in_features: int
    out_features: int
    transposed: bool = False  # stored (in, out)
    bits: int = 0  # quantized only, as are the next four
    group_size: int = 0
    scales: ir.Value | None = None
    zero_points: ir.Value | None = None
    group_index: ir.Value | None = None  # which group each input belongs to; None: k // group_size

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or f"{self.layout} without name"

    @property
    def x(self) -> ir.Value:
        """What it multiplies, (…, in_features)."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> ir.Value:
        """What it gives, (…, out_features)."""
        return self.node.outputs[0]

    @property
    def dtype(self) -> ir.DataType:
        """The float type that it computes in."""
        dtype = self.x.dtype or self.y.dtype or (self.scales or self.weight).dtype
        assert dtype is not None
        return dtype

    def values_at(self, rows: Index, columns: Index) -> npt.NDArray[np.float32]:
        """The weight, taken as (out_features, in_features), at these positions; dequantized where it is quantized."""
        if self.layout != "MatMulNBits":
            values = numpy_of(self.weight)
            return (values[columns, rows] if self.transposed else values[rows, columns]).astype(np.float32)
        assert self.scales is not None
        group = columns // self.group_size
        if self.group_index is not None:
            group = numpy_of(self.group_index)[columns].astype(np.int64)
        codes = numpy_of(self.weight).reshape(self.out_features, -1)  # a row's bytes: whole groups after each other
        code = _unpacked(codes, rows, columns, self.bits)
        scale = numpy_of(self.scales).reshape(self.out_features, -1)[rows, group].astype(np.float32)
        return (code - self._zero_at(rows, group)) * scale

    def _zero_at(self, rows: Index, group: Index) -> npt.NDArray[np.float32]:
        if self.zero_points is None:
            return np.full(rows.shape, 2 ** (self.bits - 1), np.float32)
        zeros = numpy_of(self.zero_points).reshape(self.out_features, -1)
        if zeros.dtype == np.uint8:
            return _unpacked(zeros, rows, group, self.bits)
        return zeros[rows, group].astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """How a manifest names this node and its weight."""
        entry: dict[str, Any] = {"node": self.node.name, "layout": self.layout, "weight": self.weight.name}
        if self.scales is not None:
            entry |= {"scales": self.scales.name, "bits": self.bits, "group_size": self.group_size}
            entry |= {"symmetric": self.zero_points is None}
            if self.zero_points is not None:
                entry["zero_points"] = self.zero_points.name
        return {**entry, "transposed": self.transposed}


def linears(model: ir.Model) -> list[Linear]:
    """Every linear layer of the main graph, in graph order.

    Raises:
        ExportError: MatMulNBits weights in a layout that is not the documented one.
    """
    return list(_linears(model))


def kind(layers: Sequence[Linear]) -> dict[str, str]:
    """What an ONNX model is, as the options of an export would say it: its quantize and precision."""
    bits = sorted({layer.bits for layer in layers if layer.bits})
    half = any(layer.dtype == ir.DataType.FLOAT16 for layer in layers)
    return {"quantize": f"int{bits[0]}" if bits else "none", "precision": "fp16" if half else "fp32"}


def numpy_of(initializer: ir.Value) -> Array:
    """An initializer's values, memory-mapped where they lie in an external file."""
    assert initializer.const_value is not None
    return initializer.const_value.numpy()


def attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute, or its default."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def _linears(model: ir.Model) -> Iterator[Linear]:
    for node in model.graph:
        if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
            found = _quantized(node)
        elif node.op_type in ("MatMul", "Gemm") and node.domain == "":
            found = _float(node)
        else:
            continue
        if found is not None:
            yield found


def _float(node: ir.Node) -> Linear | None:
    weight, transposed = node.inputs[1], not attribute(node, "transB")
    if weight is None or attribute(node, "transA"):
        return None
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        if weight.shape is not None and len(weight.shape) != 2:
            return None
        weight, transposed = producer.inputs[0], not transposed
    if weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    first, second = (int(size) for size in weight.const_value.shape.numpy())
    sizes = (first, second) if transposed else (second, first)
    layout: Layout = "Gemm" if node.op_type == "Gemm" else "MatMul"
    return Linear(node, layout, weight, *sizes, transposed)


def _quantized(node: ir.Node) -> Linear | None:
    inputs: list[ir.Value | None] = [value if value and value.name else None for value in node.inputs]
    inputs += [None] * (5 - len(inputs))
    weight, scales = inputs[1], inputs[2]
    if weight is None or scales is None or weight.const_value is None or scales.const_value is None:
        return None
    if attribute(node, "weight_prepacked"):
        raise ExportError(
            f"{node.name}: its int4 weight is prepacked for one kind of GPU (weight_prepacked), a layout that is "
            "not read here; build the model without matmulnbits_weights_prepacked, or give the Hugging Face folder"
        )
    return Linear(
        node,
        "MatMulNBits",
        weight,
        attribute(node, "K"),
        attribute(node, "N"),
        bits=attribute(node, "bits", 4),
        group_size=attribute(node, "block_size"),
        scales=scales,
        zero_points=inputs[3],
        group_index=inputs[4],
    )


def _unpacked(packed: Array, rows: Index, positions: Index, bits: int) -> npt.NDArray[np.float32]:
    """Entry `positions` of each of `rows`, low bits first in each byte."""
    per_byte = 8 // bits
    byte = packed[rows, positions // per_byte]
    code = (byte >> ((positions % per_byte) * bits).astype(np.uint8)) & np.uint8(2**bits - 1)
    return np.asarray(code, np.float32)
