"""Which nodes of an ONNX graph are the adapted modules, and why the others are not.

Asked in this order, for each module: the mark that this program's exporter leaves on a node (`diablo.module`), the
scopes that torch.onnx records, names of nodes and weights, and last the weight's values (the adapter carries 64
samples of each base weight, which also tell after int4). Whatever a name promises, sizes must agree and so must
the values. A fused node (q, k and v in one weight) is several modules; a module that the graph holds in parts is
several nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from diablo_export.adapter import AdaptedModule
from diablo_export.converters.onnx_aside import in_branches, same_values, unread
from diablo_export.converters.onnx_linears import Linear, attentions, linears
from diablo_export.converters.onnx_names import may_be_one, of_path, paths, same, scope
from diablo_export.errors import MatchError, indented
from diablo_export.fingerprint import SAME_WEIGHT, positions
from diablo_export.measure.names import parts_of
from diablo_export.opschema import MODULE, ROWS

# leaf of a fused layer → the layers it fuses, in output order
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_BFLOAT16 = 2**-8  # one rounding to bfloat16, the coarsest float that a graph may hold, relative
_FEW_SAMPLES = 8  # fewer samples of a part are no evidence


@dataclass(frozen=True)
class Piece:
    """A node, and the rows of its output that are meant."""

    linear: Linear
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether these are all of the node's outputs."""
        return (self.start, self.stop) == (0, self.linear.out_features)


@dataclass(frozen=True)
class Match:
    """Where one module is in the graph: one piece, or several whose outputs joined are the module's."""

    module: AdaptedModule
    pieces: tuple[Piece, ...]
    why: str
    again: tuple[Linear, ...] = ()  # nodes that are this module as well: one that runs several times, as ALBERT's do

    def describe(self) -> dict[str, object]:
        """The manifest's entry for this module, without its action."""
        entry: dict[str, object] = {"name": self.module.name, "why": self.why}
        if self.again:
            entry["again"] = [linear.node.name for linear in self.again]
        if len(self.pieces) == 1:
            piece = self.pieces[0]
            rows = None if piece.whole else [piece.start, piece.stop]  # of a node that is several modules
            return entry | piece.linear.describe() | {"rows": rows}
        stops = np.cumsum([piece.stop - piece.start for piece in self.pieces]).tolist()
        starts = [0, *stops[:-1]]
        parts = [  # rows of the module that this node computes
            piece.linear.describe() | {"rows": [start, stop]}
            for piece, start, stop in zip(self.pieces, starts, stops, strict=True)
        ]
        return entry | {"parts": parts}


def match(model: ir.Model, modules: Mapping[str, AdaptedModule], fused: bool = False) -> dict[str, Match]:
    """Find every module in the graph.

    Args:
        model: the graph.
        modules: what is looked for, by name.
        fused: also in Attention nodes, whose weight a merge can change.

    Raises:
        MatchError: lists each module that was not found, and why.
        ExportError: weights in a layout that cannot be read.
    """
    layers = linears(model) + (attentions(model) if fused else [])
    found: dict[str, Match] = {}
    faults: list[str] = []
    for module in modules.values():
        result = _find(module, modules, layers)
        if isinstance(result, Match):
            found[module.name] = result
        else:
            faults.append(f"{module.name}: {result}")
    faults += _clashes(found.values())
    faults += _inside(found.values(), in_branches(model.graph))
    if faults:
        others = unread(model.graph, {layer.node for layer in layers})
        raise MatchError(
            f"{len(faults)} of the {len(modules)} adapted modules could not be tied to the graph "
            f"({len(layers)} linear nodes):\n{indented(faults)}\n"
            + (f"The graph has weights that are not read here: {others}; export it without these.\n" if others else "")
            + "Give the ONNX model of the very base that the adapter was trained on, or its Hugging Face folder"
        )
    taken = {id(piece.linear.node) for one in found.values() for piece in one.pieces}
    free = [layer for layer in layers if id(layer.node) not in taken]
    return {name: replace(one, again=_again(one, free)) for name, one in found.items()}


def _find(module: AdaptedModule, modules: Mapping[str, AdaptedModule], layers: Sequence[Linear]) -> Match | str:
    """The module's match, or why there is none."""
    reasons: list[str] = []
    for why, named in (
        (f"node metadata {MODULE}", _by_mark),
        ("torch.onnx scope of the node", _by_scope),
        ("name of the node", _by_name),
    ):
        for pieces in named(module, modules, layers):
            fault = _misfit(module, pieces)
            likeness = _likeness(module, pieces) if fault is None else None
            fault = fault or _strange(module, pieces, likeness)
            if fault is None:
                return Match(module, tuple(pieces), why + _evidence(likeness))
            reasons.append(f"{' + '.join(piece.linear.name for piece in pieces)} ({why}) {fault}")
    by_values = _by_values(module, layers)
    if isinstance(by_values, Match):
        return by_values
    return "; ".join([*dict.fromkeys(reasons), by_values])


def _misfit(module: AdaptedModule, pieces: Sequence[Piece]) -> str | None:
    """Why these pieces cannot be the module, whatever they are called; None when they may be."""
    widths = {piece.linear.in_features for piece in pieces}
    outputs = sum(piece.stop - piece.start for piece in pieces)
    if widths != {module.in_features} or outputs != module.out_features:
        sizes = f"{'/'.join(map(str, sorted(widths)))} → {outputs}"
        return f"is {sizes}, the adapter's module is {module.in_features} → {module.out_features} (inputs → outputs)"
    if len({id(piece.linear.x) for piece in pieces}) > 1:
        return "do not share one input"
    return None


def _strange(module: AdaptedModule, pieces: Sequence[Piece], likeness: float | None) -> str | None:
    """What is wrong with their values; None when these are the module's, or nothing is known of them."""
    if likeness is None or (likeness >= SAME_WEIGHT and _as_exact_as_stored(module, pieces)):
        return None
    return f"has other values than the base weight (cosine of 64 samples {likeness:.2f}); the adapter has another base"


def _likeness(module: AdaptedModule, pieces: Sequence[Piece]) -> float | None:
    """Cosine between the module's 64 samples and the same places in the graph; None without samples."""
    if module.fingerprint is None:
        return None
    return module.fingerprint.similarity(_samples(module, pieces))


def _as_exact_as_stored(module: AdaptedModule, pieces: Sequence[Piece]) -> bool:
    """Float weights must agree to the coarsest float rounding; quantized ones may differ."""
    if module.fingerprint is None or any(piece.linear.bits for piece in pieces):
        return True
    return np.allclose(_samples(module, pieces), module.fingerprint.samples, rtol=_BFLOAT16, atol=1e-7)


def _samples(module: AdaptedModule, pieces: Sequence[Piece]) -> npt.NDArray[np.float32]:
    rows, columns = positions(module.out_features, module.in_features)
    values = np.empty(len(rows), np.float32)
    offset = 0  # of the piece's first row among the module's
    for piece in pieces:
        size = piece.stop - piece.start
        here = (rows >= offset) & (rows < offset + size)
        values[here] = piece.linear.values_at(rows[here] - offset + piece.start, columns[here])
        offset += size
    return values


def _evidence(likeness: float | None) -> str:
    return "; the adapter has no samples to check it" if likeness is None else f"; values agree (cosine {likeness:.3f})"


# ---------------------------------------------------------------------------------------------------------- by name


def _by_mark(
    module: AdaptedModule, modules: Mapping[str, AdaptedModule], layers: Sequence[Linear]
) -> Iterator[list[Piece]]:
    """Nodes that this program marked when it built the graph."""
    parts: list[Linear] = []
    for layer in layers:
        marked = layer.node.metadata_props.get(MODULE) or ""
        names = marked.split(",") if module.name in marked else []
        if names == [module.name]:
            parts.append(layer)
        elif module.name in names:
            yield from _range_of(module, names, modules, layer)
    if parts:
        yield [_all_of(layer) for layer in sorted(parts, key=_first_row)]


def _first_row(layer: Linear) -> int:
    """Which row of the module a node that is a part of it begins at."""
    start = (layer.node.metadata_props.get(ROWS) or "").partition(":")[0]
    return int(start) if start.isdigit() else 0


def _by_scope(
    module: AdaptedModule, modules: Mapping[str, AdaptedModule], layers: Sequence[Linear]
) -> Iterator[list[Piece]]:
    """Nodes whose last scope but one, as torch.onnx records it, is the module's path."""
    for layer in layers:
        if scope(layer.node) == module.name:
            yield [_all_of(layer)]


def _by_name(
    module: AdaptedModule, modules: Mapping[str, AdaptedModule], layers: Sequence[Linear]
) -> Iterator[list[Piece]]:
    """Nodes, or weights, that are named after the module, after a fused layer it is in, or after its parts."""
    *parent, leaf = parts_of(module.name)
    for layer in layers:
        if any(same(path, [*parent, leaf]) for path in paths(layer)):
            yield [_all_of(layer)]
    for fused, parts in _FUSED.items():
        if leaf in parts:
            names = [f"{module.name.removesuffix(leaf)}{part}" for part in parts]
            for layer in layers:
                if any(same(path, [*parent, fused]) for path in paths(layer)):
                    yield from _range_of(module, names, modules, layer)
        if leaf == fused:
            named = [next(of_path(layers, [*parent, part]), None) for part in parts]
            if all(named):
                yield [_all_of(layer) for layer in named if layer]


def _all_of(layer: Linear) -> Piece:
    return Piece(layer, 0, layer.out_features)


def _range_of(
    module: AdaptedModule, names: Sequence[str], modules: Mapping[str, AdaptedModule], layer: Linear
) -> Iterator[list[Piece]]:
    """Where the module may lie in a layer that fuses the modules `names`, in this order.

    Sizes of modules that are not adapted are unknown here: k and v are taken to be as wide as each other, and
    otherwise what is left over is the width of the one unknown.
    """
    sizes = {name: modules[name].out_features for name in names if name in modules}
    if len(names) == 3 and (twin := sizes.get(names[1]) or sizes.get(names[2])):
        sizes |= {names[1]: twin, names[2]: twin}
    unknown = [name for name in names if name not in sizes]
    rest = layer.out_features - sum(sizes.values())
    if len(unknown) == 1:
        sizes[unknown[0]] = rest
    start = sum(sizes.get(name, 0) for name in names[: names.index(module.name)])
    if layer.in_features == module.in_features and start + module.out_features <= layer.out_features:
        yield [Piece(layer, start, start + module.out_features)]


# -------------------------------------------------------------------------------------------------------- by values


def _by_values(module: AdaptedModule, layers: Sequence[Linear]) -> Match | str:
    """The one place whose values are the module's, or why there is none."""
    if module.fingerprint is None:
        return "no node has its name, and the adapter carries no samples of its base weight to recognise it by"
    fitting = [layer for layer in layers if layer.in_features == module.in_features]
    whole = [layer for layer in fitting if layer.out_features == module.out_features]
    scored, good = _scored(module, (_best_rows(module, layer) for layer in whole))
    if not good:  # slower: every run of rows of the larger layers, then runs of smaller layers
        larger = (_best_rows(module, layer) for layer in fitting if layer.out_features > module.out_features)
        more, good = _scored(module, (*larger, *_parts(module, fitting)))
        scored += more
    if len(good) == 1:
        likeness, pieces = good[0]
        return Match(module, tuple(pieces), f"values of the weight (cosine {likeness:.3f} over 64 samples)")
    if good:
        names = ", ".join(pieces[0].linear.name for _, pieces in good)
        return f"several nodes have its values: {names}"
    closest = f", the closest has a cosine of {max(s for s, _ in scored):.2f}" if scored else ""
    return (
        f"no linear node has the values of its base weight ({module.in_features} → {module.out_features}; "
        f"{len(scored)} places of that size{closest})"
    )


_Scored = list[tuple[float, list[Piece]]]  # likeness and place


def _scored(module: AdaptedModule, places: Iterable[list[Piece]]) -> tuple[_Scored, _Scored]:
    """Each place with its likeness to the module, and those of them that are it."""
    scored = [(_likeness(module, pieces) or 0.0, pieces) for pieces in places]
    good = [(s, pieces) for s, pieces in scored if s >= SAME_WEIGHT and _as_exact_as_stored(module, pieces)]
    return scored, [(s, pieces) for s, pieces in good if _misfit(module, pieces) is None]


def _best_rows(module: AdaptedModule, layer: Linear) -> list[Piece]:
    """The run of rows of this layer, which is at least as large, that is most like the module."""
    assert module.fingerprint is not None
    room = layer.out_features - module.out_features
    rows, columns = positions(module.out_features, module.in_features)
    starts = np.arange(room + 1)
    values = layer.values_at(rows + starts[:, None], np.broadcast_to(columns, (room + 1, len(columns))))
    norms = np.linalg.norm(values, axis=1) * np.linalg.norm(module.fingerprint.samples)
    likeness = (values @ module.fingerprint.samples) / np.maximum(norms, 1e-30)  # (room + 1,)
    start = int(likeness.argmax())
    return [Piece(layer, start, start + module.out_features)]


def _parts(module: AdaptedModule, layers: Sequence[Linear]) -> list[list[Piece]]:
    """Smaller layers that, one below the other, are the module: one such list, or none."""
    assert module.fingerprint is not None
    rows, columns = positions(module.out_features, module.in_features)
    parts: list[Piece] = []
    offset = 0
    while offset < module.out_features:
        best: tuple[float, Linear] | None = None
        for layer in layers:
            here = (rows >= offset) & (rows < offset + layer.out_features)
            if layer.out_features > module.out_features - offset or here.sum() < _FEW_SAMPLES:
                continue
            values, wanted = layer.values_at(rows[here] - offset, columns[here]), module.fingerprint.samples[here]
            norms = float(np.linalg.norm(values) * np.linalg.norm(wanted))
            likeness = float(values @ wanted) / norms if norms else 0.0
            if likeness >= SAME_WEIGHT and (best is None or likeness > best[0]):
                best = (likeness, layer)
        if best is None:
            return []
        parts.append(_all_of(best[1]))
        offset += best[1].out_features
    return [parts] if len(parts) > 1 else []


def _clashes(found: Iterable[Match]) -> list[str]:
    """Modules that were tied to the same outputs of the same node."""
    faults: list[str] = []
    taken: list[tuple[Piece, str]] = []
    for one in found:
        for piece in one.pieces:
            for other, name in taken:
                if other.linear.node is piece.linear.node and piece.start < other.stop and other.start < piece.stop:
                    faults.append(f"{one.module.name}: {piece.linear.name} is already {name}")
            taken.append((piece, one.module.name))
    return faults


def _inside(found: Iterable[Match], hidden: Sequence[Linear]) -> list[str]:
    """Modules that are computed inside of branches as well, where the blocks would be missing."""
    return [
        f"{one.module.name}: {other.name}, inside of a branch, is this module as well, and would go without the blocks"
        for one in found
        for other in hidden
        if any(same_values(piece.linear, other) for piece in one.pieces)
    ]


def _again(one: Match, layers: Sequence[Linear]) -> tuple[Linear, ...]:
    """Further nodes that are the module: of its name but for a number at the end of a part, and of the same values."""
    named = [(piece.linear, other) for piece in one.pieces for other in layers if may_be_one(piece.linear, other)]
    return tuple(dict.fromkeys(other for linear, other in named if same_values(linear, other)))
