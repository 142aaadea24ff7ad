"""The quantized weight behind a node of an export: MatMulNBits' own, or codes that a DequantizeLinear reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from diablo_export.blockdiag import Array
from diablo_export.measure.places import Graph
from diablo_export.quantization import Float32, unpack


@dataclass(frozen=True)
class Coded:
    """How a node's weight is quantized."""

    graph: Graph
    node: onnx.NodeProto  # MatMulNBits or DequantizeLinear
    bits: int
    size: int  # inputs of a group
    has_zeros: bool
    flip: bool = False  # a DequantizeLinear's codes are (in, out)

    def rows(self, start: int, stop: int) -> Float32:
        """Some outputs of the weight, (stop − start, in_features); what is stored is read once, and kept."""
        return (self._packed if self.node.op_type == "MatMulNBits" else self._plain)(start, stop)

    def _packed(self, start: int, stop: int) -> Float32:
        inputs = _attributes(self.node)["K"]
        codes, scales, zeros, table = self._bytes
        values: Any = table.take(codes[start:stop], axis=0, mode="clip")  # (rows, bytes, codes of a byte)
        values = values.reshape(stop - start, -1, self.size)  # (rows, groups, size)
        if zeros is not None:
            values -= zeros[start:stop, :, None]
        values *= scales[start:stop, :, None]
        return np.asarray(values.reshape(stop - start, -1)[:, :inputs], np.float32)

    @cached_property
    def _bytes(self) -> tuple[Array, Float32, Float32 | None, Float32]:
        """MatMulNBits' codes (out, bytes), scales and zero points (out, groups), and the codes of each byte.

        Without zero points those of the codes are taken off in the table.
        """
        attributes = _attributes(self.node)
        out, groups = attributes["N"], -(-attributes["K"] // self.size)
        codes, scales = (self.graph.read(name).reshape(out, -1) for name in self.node.input[1:3])
        table = unpack(np.arange(256, dtype=np.uint8)[:, None], self.bits, 8 // self.bits).astype(np.float32)
        zeros = None
        if self.has_zeros:
            stored = self.graph.read(self.node.input[3]).reshape(out, -1)
            # of the scales' type they are not rounded to codes
            zeros = (unpack(stored, self.bits, groups) if stored.dtype == np.uint8 else stored).astype(np.float32)
        else:
            table -= np.float32(2 ** (self.bits - 1))
        return codes, scales.astype(np.float32), zeros, table

    def _plain(self, start: int, stop: int) -> Float32:
        codes, scales, *zeros = self._oriented_values
        here = codes[start:stop].astype(np.float32)
        spread = [self._spread(each[start:stop], here.shape[1]) for each in (scales, *zeros)]
        return np.asarray((here - spread[1] if zeros else here) * spread[0], np.float32)

    @cached_property
    def _oriented_values(self) -> list[Array]:
        return [self._oriented(self.graph.read(name)) for name in self.node.input if name]

    def _oriented(self, stored: Array) -> Array:
        """(out, …) of what is stored by inputs and outputs, or by outputs alone."""
        if stored.ndim < 2:
            return stored.reshape(-1, 1)
        return stored.T if self.flip else stored

    def _spread(self, groups: Array, inputs: int) -> Float32:
        return np.repeat(groups.astype(np.float32), self.size, axis=1)[:, :inputs]


def coded(graph: Graph, node: onnx.NodeProto) -> Coded | None:
    """How the weight of a linear node is quantized; None for a float one, or groups that are no runs of inputs."""
    if node.op_type == "MatMulNBits":
        attributes = _attributes(node)
        zeros = len(node.input) > 3 and bool(node.input[3])
        return Coded(graph, node, attributes.get("bits", 4), attributes["block_size"], zeros)
    flip = not _attributes(node).get("transB")
    source = graph.maker(node.input[1])
    if source is not None and source.op_type == "Transpose":
        flip, source = not flip, graph.maker(source.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return None
    codes, scales = (graph.stored.get(name) for name in source.input[:2])
    if codes is None or scales is None or len(codes.dims) != 2 or not scales.dims:  # one scale for all: no groups
        return None
    attributes, kind = _attributes(source), onnx.TensorProto.DataType.Name(codes.data_type)
    along_inputs = attributes.get("axis", 1) % 2 == (0 if flip else 1)
    if (len(scales.dims) == 2) != along_inputs:
        return None
    size = attributes["block_size"] if along_inputs else int(codes.dims[0 if flip else 1])
    return Coded(graph, source, int(kind[-1]), size, len(source.input) > 2 and bool(source.input[2]), flip)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {entry.name: entry.i for entry in node.attribute}
