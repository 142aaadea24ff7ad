"""What the names in an ONNX graph say of the modules that its nodes were made of."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from diablo_export.converters.onnx_linears import Linear
from diablo_export.measure.names import parts_of, said
from diablo_export.opschema import MODULE

SCOPES = "pkg.torch.onnx.name_scopes"  # node metadata: the modules around a node; the last but one is the layer


def scope(node: ir.Node) -> str | None:
    """The module path that torch.onnx recorded on a node, or None."""
    recorded = node.metadata_props.get(SCOPES)
    return _last_but_one(recorded) if recorded else None


@functools.lru_cache(1 << 12)  # each module asks every layer
def _last_but_one(recorded: str) -> str | None:
    try:
        scopes = ast.literal_eval(recorded)
    except (SyntaxError, ValueError):
        return None
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else None


def named(layers: Sequence[Linear], module: str) -> Iterator[Linear]:
    """The layers that say they are this module, by mark, scope or name; the surest first."""
    yield from (layer for layer in layers if layer.node.metadata_props.get(MODULE) == module)
    yield from (layer for layer in layers if scope(layer.node) == module)
    yield from of_path(layers, parts_of(module))


def of_path(layers: Iterable[Linear], path: list[str]) -> Iterator[Linear]:
    """The layers whose node or weight is named by this path."""
    return (layer for layer in layers if any(same(other, path) for other in paths(layer)))


def paths(layer: Linear) -> list[list[str]]:
    """What a node's name and its weight's name say about the module: the words before the operator's."""
    return said(layer.name, layer.weight.name or "")


def same(first: list[str], second: list[str]) -> bool:
    """Equal, or equal but for a prefix such as the name of the base model."""
    length = min(len(first), len(second))
    return first == second or (length >= 3 and first[-length:] == second[-length:])


def may_be_one(first: Linear, second: Linear) -> bool:
    """Whether what the exporter recorded of two nodes allows that they are runs of one module."""
    scopes = scope(first.node), scope(second.node)
    if all(scopes):
        return scopes[0] == scopes[1]
    return _unnumbered(first.name) == _unnumbered(second.name)


@functools.lru_cache(1 << 12)
def _unnumbered(name: str) -> str:
    return re.sub(r"(_Q?\d+)+(?=/|$)", "", name)  # onnxruntime's quantizer puts _Q4 behind the number
