"""Graphs of branches alone, and adapters for them, for the tests of swapping: x, plus each module's branch in turn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from diablo_export import opschema
from diablo_export.block_storage import BASE_KEY, base_mark, to_int8
from diablo_export.blockdiag import Array
from diablo_export.swap import write_adapter

BASE, OTHER_BASE = "0000001a" + "0" * 56, "0000002b" + "0" * 56
SIZE = 48


def graph_file(
    file: Path,
    modules: tuple[str, ...] = ("m",),
    base: str | None = BASE,
    size: int = SIZE,
    stored: int = TensorProto.FLOAT,
    head: bool = False,
) -> Path:
    """Save y = x, plus x · blockdiag(D) of each module in turn, plus an overridable head of ones where asked for."""
    inputs, defaults, nodes, last = [_value("x", TensorProto.FLOAT, ["n", size])], [], [], "x"
    int8 = stored == TensorProto.INT8
    for module in modules:
        given = [last, opschema.input_name(module), *([opschema.scales_name(module)] if int8 else []), last]
        inputs.append(_value(given[1], stored, ["b", "i", "o"]))
        defaults.append(helper.make_tensor(given[1], stored, [0, 0, 0], []))
        if int8:
            inputs.append(_value(given[2], TensorProto.FLOAT, ["b"]))
            defaults.append(helper.make_tensor(given[2], TensorProto.FLOAT, [0], []))
        name = opschema.NAME_INT8 if int8 else opschema.NAME
        last = f"{module}_y"
        nodes.append(helper.make_node(name, given, [last], domain=opschema.DOMAIN))
    if head:
        inputs.append(_value("head.weight", TensorProto.FLOAT, [size]))
        defaults.append(helper.make_tensor("head.weight", TensorProto.FLOAT, [size], np.ones(size)))
    nodes.append(helper.make_node("Mul" if head else "Identity", [last, *(["head.weight"] if head else [])], ["y"]))
    graph = helper.make_graph(nodes, "g", inputs, [_value("y", TensorProto.FLOAT, ["n", size])], defaults)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(opschema.DOMAIN, opschema.VERSION)]
    function = opschema.function(18, opschema.NAME_INT8 if int8 else opschema.NAME)
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=8)
    if base is not None:
        helper.set_model_props(model, {BASE_KEY: base})
    onnx.save(model, file)
    return file


def random_blocks(num_blocks: int, seed: int = 0, size: int = SIZE) -> Array:
    shape = (num_blocks, size // num_blocks, size // num_blocks)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapter_file(
    file: Path, blocks: Mapping[str, Array], base: str | None = BASE, int8: bool = False, **more: Array
) -> Path:
    """Save blocks by module, and further inputs by name with _ for the dot, as an .onnx_adapter."""
    values: dict[str, Array] = {}
    for module, value in blocks.items():
        if int8:
            values[opschema.input_name(module)], values[opschema.scales_name(module)] = to_int8(value)
        else:
            values[opschema.input_name(module)] = value
    values |= {name.replace("_", "."): value for name, value in more.items()}
    write_adapter(file, values, None if base is None else base_mark(base))
    return file


def _value(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
