"""Where each linear module lies in an exported graph: the value that it reads and the values that it gives.

A module's output is what its torch twin returns: behind the bias and the branch, wherever the exporter put them; some
rows of a value where one node is several modules; several values where a module is several nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from diablo_export import opschema
from diablo_export.measure.exported_base import read_tensor
from diablo_export.opschema import MODULE, ROWS

LINEAR = ("MatMul", "Gemm", "MatMulNBits")
PASSED = ("Cast", "Identity", "Dropout", "Reshape")  # nodes that leave the numbers of a module alone
STEPS = ("Add", "Sub", "Mul", "Div")  # nodes by which biases, scales and adapters come in
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_JOIN = "diablo_join"  # how the Concat is called that puts the outputs of several nodes together


@dataclass(frozen=True)
class Part:
    """One node's share of a module: columns [start, stop) of a value, and columns [first, last) of the module."""

    node: onnx.NodeProto
    rows: tuple[int, int]  # of the node's weight
    y: str
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """One module: what it reads, and the parts that side by side are its output."""

    name: str
    x: str
    parts: tuple[Part, ...]

    @property
    def taps(self) -> set[str]:
        """The values to ask the graph for."""
        return {self.x, *(part.y for part in self.parts)}


def marks(node: onnx.NodeProto) -> list[str]:
    """The modules that a node is marked with."""
    return [module for entry in node.metadata_props if entry.key == MODULE for module in entry.value.split(",")]


class Graph:
    """A model file without its large weights, and who makes and reads each value.

    Attributes:
        proto: the model.
        stored: initializers by name; the large ones without their values.
        path: the file; those lie beside it.
        readers: the nodes that read a value.
        widths: the last dimension of values behind linear nodes, where it is known.
    """

    def __init__(self, path: Path) -> None:
        self.proto = onnx.load(path, load_external_data=False)
        self.path = path
        self.stored = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self.nodes = {node.name: node for node in self.proto.graph.node}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.proto.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self._makers = {name: node for node in self.proto.graph.node for name in node.output}
        self.widths = dict(self._all_widths())

    def places(self, modules: Iterable[Mapping[str, Any]], biased: Mapping[str, bool]) -> dict[str, Place]:
        """Every module of `biased` whose output can be found: by the manifest's entries, or by the marks on nodes.

        Args:
            modules: the manifest's entries of adapted modules.
            biased: the modules to look for, and whether each has a bias.
        """
        shares: dict[str, list[tuple[onnx.NodeProto, tuple[int, int] | None]]] = {}
        for entry in modules:
            for part in entry.get("parts") or [entry]:
                node = self.nodes.get(str(part.get("node")))
                if node is not None:
                    rows = None if entry.get("parts") else part.get("rows")
                    shares.setdefault(entry["name"], []).append((node, tuple(rows) if rows else None))
        for name, nodes in self._marked().items():
            if name not in shares:
                shares[name] = [(node, None) for node in nodes]
        found = {}
        for name, share in shares.items():
            if name not in biased or (biased[name] and any(self.hidden_bias(node) for node, _ in share)):
                continue
            if all(node.op_type in LINEAR and self.width(node) for node, _ in share):
                parts = tuple(self._part(name, node, rows, biased[name]) for node, rows in share)
                if len({node.input[0] for node, _ in share}) == 1:
                    found[name] = Place(name, share[0][0].input[0], parts)
        return found

    def hidden_bias(self, node: onnx.NodeProto) -> str | None:
        """The operator that adds a bias to the node's output inside itself: the sum is no value of the graph."""
        for reader in self.readers.get(node.output[0], []):
            stored = [self.stored[name] for name in reader.input if name in self.stored]
            wide = [one for one in stored if len(one.dims) == 1 and one.dims[0] >= self.width(node)]
            vectors = [one for one in wide if one.data_type in FLOATS]
            norms = (1 if "Simplified" in reader.op_type else 2) if "LayerNorm" in reader.op_type else 0
            if len(vectors) > norms and reader.op_type not in (*PASSED, *STEPS, *LINEAR):
                return str(reader.op_type)
        return None

    @property
    def rounded_table(self) -> str | None:
        """The tokens' embeddings, where the table is quantized, as other programs do; None where it is float."""
        nodes = (node for node in self.proto.graph.node if node.op_type == "GatherBlockQuantized")
        return next((node.output[0] for node in nodes if "input_ids" in node.input), None)

    @property
    def experts(self) -> dict[str, onnx.NodeProto]:
        """The modules whose experts are quantized, and their nodes."""
        return {module: node for node in self.proto.graph.node if node.op_type == "QMoE" for module in marks(node)}

    @property
    def mixed(self) -> dict[str, str]:
        """What quantized experts give, by module: behind the sum of their weights, which the operator makes one."""
        return {module: self.readers[node.output[0]][0].output[0] for module, node in self.experts.items()}

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """The values of an initializer."""
        return read_tensor(self.stored[name], self.path)

    def tapped(self, values: Iterable[str]) -> bytes:
        """The model with these values among its outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        there = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(set(values) - there))
        return bytes(model.SerializeToString())

    def _marked(self) -> dict[str, list[onnx.NodeProto]]:
        """Nodes by the one module that they are marked with, in the order of their rows."""
        found: dict[str, list[tuple[int, onnx.NodeProto]]] = {}
        for node in self.proto.graph.node:
            if node.op_type in LINEAR and len(modules := marks(node)) == 1:
                rows = next((entry.value for entry in node.metadata_props if entry.key == ROWS), "0")
                found.setdefault(modules[0], []).append((int(rows.partition(":")[0]), node))
        return {name: [node for _, node in sorted(nodes, key=lambda n: n[0])] for name, nodes in found.items()}

    def _part(self, module: str, node: onnx.NodeProto, rows: tuple[int, int] | None, bias: bool) -> Part:
        start, stop = rows or (0, self.width(node))
        kept, value = (start, stop), node.output[0]
        while (step := self._step(module, value, start, stop, bias)) is not None:
            value, start, stop, bias = step
        return Part(node, kept, value, start, stop)

    def _step(self, module: str, value: str, start: int, stop: int, bias: bool) -> tuple[str, int, int, bool] | None:
        """Where a module's columns of a value go next while they are still the module's; None at its end."""
        for node in self.readers.get(value, []):
            if node.domain == opschema.DOMAIN and node.input[-1] == value:
                if module in {entry.value for entry in node.metadata_props if entry.key == MODULE}:
                    return node.output[0], start, stop, bias
            elif node.op_type == "Add" and bias and self._vector(node) == self.widths.get(value):
                return node.output[0], start, stop, False
            elif node.op_type == "Split" and (start, stop) != (0, self.widths.get(value)):
                at = 0
                for part in node.output:
                    width = self.widths.get(part, 0)
                    if at <= start and stop <= at + width:
                        return part, start - at, stop - at, bias
                    at += width
            elif node.op_type == "Concat" and node.name.endswith(_JOIN):
                before = node.input[: list(node.input).index(value)]
                at = sum(self.widths.get(name, 0) for name in before)
                return node.output[0], start + at, stop + at, bias
        return None

    def _vector(self, node: onnx.NodeProto) -> int | None:
        """The size of the stored vector that an Add adds."""
        sizes = [list(self.stored[name].dims) for name in node.input if name in self.stored]
        return int(sizes[0][0]) if len(sizes) == 1 and len(sizes[0]) == 1 else None

    def _all_widths(self) -> Iterator[tuple[str, int]]:
        """The last dimension of every linear node's output and of what is made of it."""
        known: dict[str, int] = {}
        for node in self.proto.graph.node:
            sizes: list[int | None] = []
            if node.op_type in LINEAR:
                sizes = [self.width(node)]
            elif node.op_type == "Add" or node.domain == opschema.DOMAIN:
                sizes = [next((known[name] for name in reversed(node.input) if name in known), None)]
            elif node.op_type == "Split" and node.input[0] in known and len(node.input) > 1:
                small = self.stored.get(node.input[1])
                sizes = [] if small is None else [int(size) for size in onnx.numpy_helper.to_array(small)]
            elif node.op_type == "Concat" and all(name in known for name in node.input):
                sizes = [sum(known[name] for name in node.input)]
            for name, size in zip(node.output, sizes, strict=False):
                if size:
                    known[name] = size
        yield from known.items()

    def width(self, node: onnx.NodeProto) -> int:
        """How many outputs a linear node has; 0 where its weight is not stored."""
        attributes = {entry.name: entry.i for entry in node.attribute}
        if node.op_type == "MatMulNBits":
            return int(attributes["N"])
        stored = self.stored.get(node.input[1])
        if stored is None or len(stored.dims) != 2:
            return self._made_width(node.input[1], last=not attributes.get("transB"))
        return int(stored.dims[0] if attributes.get("transB") else stored.dims[1])

    def maker(self, value: str) -> onnx.NodeProto | None:
        """The node that gives this value; None for what is stored or fed."""
        return self._makers.get(value)

    def _made_width(self, weight: str, last: bool) -> int:
        """The last dimension, or the first, of a stored matrix behind a Transpose, a DequantizeLinear, or both."""
        source = self.maker(weight)
        if source is None or source.op_type not in ("Transpose", "DequantizeLinear"):
            stored = self.stored.get(weight)
            return int(stored.dims[-1 if last else 0]) if stored is not None and len(stored.dims) == 2 else 0
        return self._made_width(source.input[0], last != (source.op_type == "Transpose"))
