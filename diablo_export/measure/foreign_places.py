"""Where the linear layers of a torch model lie in a graph that another program made: found by their weights' values.

The node that multiplies by a module's weight is told by 64 samples of it, whatever names and layouts are, merged or
not, float or quantized. Where the module's output is, nobody says: behind a bias, behind LoRA's products, scaled and
added where the exporter likes. So `ends` lists the values that it may be, and who asks takes the one that is nearest to
torch's own output for the same input: then no sound export is accused, and what has lost its adapter has no such value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx

from diablo_export.blockdiag import Array
from diablo_export.fingerprint import SAME_WEIGHT, positions
from diablo_export.measure.coded import coded
from diablo_export.measure.names import parts_of, said
from diablo_export.measure.places import FLOATS, LINEAR, PASSED, STEPS, Graph

# what LoRA, DoRA and their like are made of; anything else, and the operand is another part of the network
_MOVED = (*PASSED, "Transpose", "Unsqueeze", "Squeeze", "Expand")  # their other inputs are sizes
_OF_ADAPTERS = (*_MOVED, *STEPS, *LINEAR, "DequantizeLinear")
_PRODUCTS = ("none", "float", "coded")
_MOST = 12  # values that may be one module's output
_FAR = 40  # nodes to look back over for what an operand is made of


@dataclass(frozen=True)
class Wanted:
    """What is known of a module: its sizes, and samples of each weight that may be stored for it."""

    out_features: int
    in_features: int
    samples: tuple[Array, ...]  # (SAMPLES,) each: of the base, and with the adapter in it


@dataclass(frozen=True)
class Found:
    """The node of a module, and which of its outputs are the module's."""

    node: onnx.NodeProto
    rows: tuple[int, int]


@dataclass(frozen=True)
class End:
    """A value that may be a module's output: columns [start, stop) of it."""

    y: str
    start: int
    stop: int
    products: str  # of the module's input that were added on the way: none, float, or coded where they are quantized


class _Weight:
    """The stored weight of a linear node, as (out_features, in_features); read when it is asked for, and not kept."""

    def __init__(self, graph: Graph, node: onnx.NodeProto) -> None:
        self.graph, self.node = graph, node
        self.out_features = graph.width(node)

    @cached_property
    def _stored(self) -> tuple[str, bool, bool]:
        """The initializer, whether it is (in, out), and whether it holds codes."""
        name, codes = self.node.input[1], self.node.op_type == "MatMulNBits"
        flip = not codes and not any(entry.name == "transB" and entry.i for entry in self.node.attribute)
        while (source := self.graph.maker(name)) is not None and source.op_type in ("Transpose", "DequantizeLinear"):
            name, flip = source.input[0], flip != (source.op_type == "Transpose")
            codes |= source.op_type == "DequantizeLinear"
        return name, flip, codes

    @cached_property
    def in_features(self) -> int:
        """Inputs; 0 where the weight is stored in a form that is not read here."""
        name, flip, codes = self._stored
        if codes and coded(self.graph, self.node) is None:
            return 0
        if self.node.op_type == "MatMulNBits":
            return next(int(entry.i) for entry in self.node.attribute if entry.name == "K")
        stored = self.graph.stored.get(name)
        return int(stored.dims[0 if flip else 1]) if stored is not None and len(stored.dims) == 2 else 0

    def dense(self) -> Array:
        """All of it."""
        grid = coded(self.graph, self.node)
        if grid is not None:
            return grid.rows(0, self.out_features)
        name, flip, _ = self._stored
        values = self.graph.read(name)
        return np.asarray(values.T if flip else values)

    @cached_property
    def samples(self) -> Array:
        """At the positions where a module of this very size is sampled, (SAMPLES,)."""
        rows, columns = positions(self.out_features, self.in_features)
        grid = coded(self.graph, self.node)
        if grid is None:
            return self.dense()[rows, columns].astype(np.float32)
        return np.array([grid.rows(row, row + 1)[0, column] for row, column in zip(rows, columns, strict=True)])


def find(graph: Graph, modules: Mapping[str, Wanted]) -> tuple[dict[str, Found], dict[str, str]]:
    """The node of each module, and of the others why there is none."""
    weights = [_Weight(graph, node) for node in graph.proto.graph.node if node.op_type in LINEAR and graph.width(node)]
    weights = [weight for weight in weights if weight.in_features]
    found: dict[str, Found] = {}
    reasons: dict[str, str] = {}
    for name, wanted in modules.items():
        result = _find(name, wanted, weights)
        if isinstance(result, Found):
            found[name] = result
        else:
            reasons[name] = result
    return found, reasons


def _find(name: str, wanted: Wanted, weights: Iterable[_Weight]) -> Found | str:
    fitting = [weight for weight in weights if weight.in_features == wanted.in_features]
    whole = [weight for weight in fitting if weight.out_features == wanted.out_features]
    scored = [(_likeness(weight.samples, wanted), weight) for weight in whole]
    good = [weight for likeness, weight in scored if likeness >= SAME_WEIGHT]
    if not good:  # a weight that is several modules
        larger = (_best_rows(wanted, weight) for weight in fitting if weight.out_features > wanted.out_features)
        runs = [(weight, start) for likeness, weight, start in larger if likeness >= SAME_WEIGHT]
        if len(runs) == 1:
            weight, start = runs[0]
            return Found(weight.node, (start, start + wanted.out_features))
    if len(good) != 1:  # of several, or where values are wrong, the name may tell
        good = [weight for weight in good or whole if _named(weight.node, name)]
    if len(good) == 1:
        return Found(good[0].node, (0, wanted.out_features))
    if len([likeness for likeness, _ in scored if likeness >= SAME_WEIGHT]) > 1:
        return "several nodes have its values"
    nearest = f", the nearest with a cosine of {max(likeness for likeness, _ in scored):.2f}" if scored else ""
    sizes = f"{wanted.in_features} → {wanted.out_features}"
    return (
        f"no {' or '.join(LINEAR)} has its weight's values, or its name ({sizes}; {len(scored)} of that size{nearest})"
    )


def _likeness(samples: Array, wanted: Wanted) -> float:
    """The cosine of samples with those of the nearest weight that is looked for."""
    return max(float(_cosines(samples[None], each)[0]) for each in wanted.samples)


def _best_rows(wanted: Wanted, weight: _Weight) -> tuple[float, _Weight, int]:
    """The run of rows of a larger weight that is most like the module, and how like."""
    rows, columns = positions(wanted.out_features, wanted.in_features)
    starts = np.arange(weight.out_features - wanted.out_features + 1)
    values = weight.dense()[rows + starts[:, None], columns].astype(np.float32)  # (starts, SAMPLES)
    likeness = np.max([_cosines(values, each) for each in wanted.samples], axis=0)
    return float(likeness.max()), weight, int(likeness.argmax())


def _cosines(rows: Array, samples: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(samples)
    return np.asarray((rows @ samples) / np.maximum(norms, 1e-30))


def _named(node: onnx.NodeProto, module: str) -> bool:
    """Whether the node, or its weight, is called like the module, but for what stands before it."""
    own = parts_of(module)
    return any(len(own) >= 3 and path[-len(own) :] == own for path in said(node.name, node.input[1]))


def ends(graph: Graph, found: Found) -> list[End]:
    """The values that may be a module's output, the node's own first."""
    node = found.node
    listed = [End(node.output[0], *found.rows, "none")]
    for end in listed:  # which grows
        listed += [step for step in _steps(graph, node, end, {one.y for one in listed}) if step not in listed]
        if len(listed) >= _MOST:
            break
    return listed[:_MOST]


def _steps(graph: Graph, node: onnx.NodeProto, end: End, own: set[str]) -> Iterator[End]:
    """Where a value goes next while it may still be the module's."""
    for reader in graph.readers.get(end.y, []):
        if reader.op_type in PASSED and reader.input[0] == end.y:
            yield End(reader.output[0], end.start, end.stop, end.products)
        elif reader.op_type in STEPS:
            made = _made_of(graph, [name for name in reader.input if name != end.y], _roots(graph, node) | own)
            if made is not None:
                both = max(end.products, made, key=_PRODUCTS.index)
                yield End(reader.output[0], end.start, end.stop, both)
        elif reader.op_type == "Split":
            at = 0
            for part in reader.output:
                width = graph.widths.get(part, 0)
                if at <= end.start and end.stop <= at + width:
                    yield End(part, end.start - at, end.stop - at, end.products)
                at += width


def _roots(graph: Graph, node: onnx.NodeProto) -> set[str]:
    """The module's input, and what it was before it was cast or reshaped."""
    names = [node.input[0]]
    while (source := graph.maker(names[-1])) is not None and source.op_type in PASSED:
        names.append(source.input[0])
    return set(names)


def _made_of(graph: Graph, operands: list[str], roots: set[str]) -> str | None:
    """Which products of the roots are in operands; None where they are made of anything but roots and constants."""
    products, waiting, seen = "none", list(operands), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name in roots or not name:
            continue
        seen.add(name)
        source = graph.maker(name)
        if source is None:
            if name not in graph.stored and name not in _adapters(graph):
                return None
        elif source.op_type != "Constant":
            if len(seen) > _FAR:
                return None
            if source.op_type not in _OF_ADAPTERS:
                if _is_stored(graph, source):
                    continue  # such as the norms of DoRA's weights
                return None
            if source.op_type in LINEAR:
                made = "float" if coded(graph, source) is None else "coded"
                products = max(products, made, key=_PRODUCTS.index)
            waiting += source.input[: 1 if source.op_type in _MOVED else None]
    return products


def _is_stored(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node computes from stored values alone."""
    waiting, seen = list(node.input), set[str]()
    while waiting and len(seen) <= _FAR:
        name = waiting.pop()
        if name in seen or not name or name in graph.stored or name in _adapters(graph):
            continue
        seen.add(name)
        source = graph.maker(name)
        if source is None:
            return False
        waiting += source.input
    return not waiting


def _adapters(graph: Graph) -> set[str]:
    """Inputs of the graph that are an adapter's weights: matrices of floats."""
    return {
        value.name
        for value in graph.proto.graph.input
        if value.type.tensor_type.elem_type in FLOATS and len(value.type.tensor_type.shape.dim) == 2
    }
