"""The linear layers of an ONNX graph: MatMul, Gemm and MatMulNBits on a stored weight, and that weight's values.

A weight may be stored in float, as MatMulNBits takes it, or as codes that a DequantizeLinear turns into floats.

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

Layout = Literal["MatMul", "Gemm", "MatMulNBits", "DequantizeLinear", "Attention"]
Index = npt.NDArray[np.int64]
_INTEGERS = {getattr(ir.DataType, name) for name in ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8")}


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
    source: ir.Node | None = None  # the DequantizeLinear that makes the weight
    fault: str | None = None  # why its groups are not runs of inputs, where they are not
    bias: tuple[ir.Value, ir.Value] | None = None  # int32 codes and scales, where those are x's times the weight's

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
        if self.source is not None:
            return self._dequantized_at(*((columns, rows) if self.transposed else (rows, columns)))
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

    def _dequantized_at(self, *places: Index) -> npt.NDArray[np.float32]:
        """What the DequantizeLinear gives at these places of its codes."""
        assert self.source is not None and self.scales is not None
        scales, codes = numpy_of(self.scales), numpy_of(self.weight)[places].astype(np.float32)
        here: tuple[Index, ...] = ()  # one scale for all
        if scales.ndim == 2:
            sizes = [attribute(self.source, "block_size") if axis == _axis(self.source) else 1 for axis in (0, 1)]
            here = tuple(place // size for place, size in zip(places, sizes, strict=True))
        elif scales.ndim == 1:
            here = (places[_axis(self.source)] if scales.size > 1 else places[0] * 0,)
        zeros = 0 if self.zero_points is None else numpy_of(self.zero_points)[here].astype(np.float32)
        return np.asarray((codes - zeros) * scales[here].astype(np.float32), np.float32)

    @property
    def stored(self) -> list[ir.Value]:
        """What of it a merge changes: the weight or its codes, scales, zero points, a bias on their grid."""
        values = (self.weight, self.scales, self.zero_points, *(self.bias or ()))
        return [value for value in values if value is not None]

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
    return linears_of(model.graph)


def linears_of(graph: ir.Graph) -> list[Linear]:
    """Every linear layer of one graph, but of those inside of its nodes; as `linears`."""
    return list(_linears(graph))


def attentions(model: ir.Model) -> list[Linear]:
    """What onnxruntime's optimizer fuses into Attention nodes: q, k and v side by side in one weight (in, 3 · out).

    Such a node gives no layer's output, so that its weight can be merged into, and nothing else be done with it.
    """
    found = []
    for node in model.graph:
        weight = node.inputs[1] if (node.op_type, node.domain) == ("Attention", "com.microsoft") else None
        if weight is not None and weight.const_value is not None:
            inputs, outputs = (int(size) for size in weight.const_value.shape.numpy())
            found.append(Linear(node, "Attention", weight, inputs, outputs, transposed=True))
    return found


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


def _linears(graph: ir.Graph) -> Iterator[Linear]:
    for node in graph:
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
    if weight is None or attribute(node, "transA") or node.attributes.get_float("alpha", 1.0) != 1.0:
        return None  # no layer's y = x · W
    weight = _itself(weight)
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        if weight.shape is not None and len(weight.shape) != 2:
            return None
        weight, transposed = _itself(producer.inputs[0]), not transposed
        producer = weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _dequantized(node, producer, transposed)
    if weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    first, second = (int(size) for size in weight.const_value.shape.numpy())
    sizes = (first, second) if transposed else (second, first)
    layout: Layout = "Gemm" if node.op_type == "Gemm" else "MatMul"
    return Linear(node, layout, weight, *sizes, transposed)


def _itself(value: ir.Value) -> ir.Value:
    """What a row of Identity nodes passes on: torch's older exporter puts one where weights are the same."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Identity" and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _dequantized(node: ir.Node, source: ir.Node, transposed: bool) -> Linear | None:
    """A node whose weight a DequantizeLinear makes of stored integers."""
    codes, scales, zeros = (*source.inputs, None)[:3]
    kept = [value for value in (codes, scales, zeros) if value is not None]
    if codes is None or scales is None or any(value.const_value is None for value in kept):
        return None
    dtype = codes.dtype
    if dtype is None or dtype not in _INTEGERS or codes.shape is None or len(codes.shape) != 2:
        return None
    first, second = (int(size) for size in codes.const_value.shape.numpy())  # type: ignore[union-attr]
    inputs, outputs = (first, second) if transposed else (second, first)
    signed = dtype.name.startswith("INT")
    if zeros is not None and signed and not numpy_of(zeros).any():
        zeros = None  # it says nothing
    size, fault = _groups_of(source, numpy_of(scales), inputs, _axis(source) == (0 if transposed else 1))
    if zeros is None and not signed:
        fault = fault or "its codes are unsigned and have no zero points, so all its weights are of one sign"
    return Linear(
        node, "DequantizeLinear", codes, inputs, outputs, transposed, dtype.bitwidth, size, scales, zeros,
        source=source, fault=fault, bias=_bias(node, numpy_of(scales)),
    )  # fmt: skip


def _bias(node: ir.Node, scales: Array) -> tuple[ir.Value, ir.Value] | None:
    """A Gemm's bias of int32, which onnxruntime adds to the sums of x's codes times the weight's: on their grid.

    It never looks at the bias's own scales then. Quantizers write those of x times those of the weight.
    """
    value = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    source = value.producer() if value is not None else None
    if source is None or source.op_type != "DequantizeLinear":
        return None
    codes, steps = source.inputs[:2]
    if codes is None or steps is None or codes.const_value is None or steps.const_value is None:
        return None
    sizes = numpy_of(steps)
    if codes.dtype != ir.DataType.INT32 or scales.ndim != 1 or sizes.shape != scales.shape or not scales.all():
        return None
    ratios = sizes / scales
    return (codes, steps) if np.allclose(ratios, ratios[0], rtol=1e-3) else None


def _groups_of(source: ir.Node, scales: Array, inputs: int, along_inputs: bool) -> tuple[int, str | None]:
    """How many inputs share a scale, and what is wrong with these groups."""
    if scales.ndim == 2 and along_inputs:
        return attribute(source, "block_size"), None
    if scales.ndim == 1 and scales.size > 1 and not along_inputs:
        return inputs, None  # one scale for each output
    if scales.ndim == 2:
        return inputs, "its groups run along the outputs, across the blocks"
    if scales.size > 1:
        return inputs, "it has one scale for each input, across the blocks"
    return inputs, "it has one scale for the whole weight, which every block meets"


def _axis(source: ir.Node) -> int:
    """The axis of a DequantizeLinear on a matrix."""
    return attribute(source, "axis", 1) % 2


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
