from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import Array, BlockShape
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.onnx_linears import linears
from diablo_export.converters.onnx_match import Match, match
from diablo_export.errors import ExportError, MatchError
from diablo_export.fingerprint import fingerprint
from diablo_export.opschema import MODULE, ROWS
from diablo_export.quantization import quantize

Get = Callable[..., Path]


def anonymous(model: ir.Model) -> ir.Model:
    """Take away every name and note by which a node could be recognised."""
    for index, node in enumerate(model.graph):
        node.metadata_props.clear()
        node.name = f"node_{index}"
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"value_{index}"
    return model


def places(found: dict[str, Match]) -> dict[str, list[tuple[tuple[int, ...], int, int]]]:
    """Where each module is, without names: the shape of the weight and the rows."""
    return {
        name: [(tuple(p.linear.weight.const_value.shape.numpy()), p.start, p.stop) for p in one.pieces]  # type: ignore[union-attr]
        for name, one in found.items()
    }


@pytest.mark.parametrize(
    ("attributes", "found"), [({}, 1), ({"transB": 1}, 1), ({"alpha": 0.5}, 0), ({"transA": 1}, 0)]
)
def test_a_gemm_is_a_linear_layer_where_it_is_x_times_w(attributes: dict[str, float], found: int) -> None:
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((4, 4), np.float32)), shape=ir.Shape((4, 4)))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((4, 4)))
    node = ir.node("Gemm", [x, weight], attributes)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21})
    assert len(linears(ir.Model(graph, ir_version=10))) == found


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_fused_qkv_of_the_genai_builder_is_three_modules(genai_graph: Get, tiny_adapter: Get, precision: str) -> None:
    model, adapter = ir.load(genai_graph("llama", precision)), Adapter.load(tiny_adapter("llama"))
    found = match(model, adapter.modules)
    assert found.keys() == adapter.modules.keys()
    rows = {leaf: found[f"model.layers.1.self_attn.{leaf}_proj"].pieces[0] for leaf in "qkv"}
    assert {leaf: (p.start, p.stop) for leaf, p in rows.items()} == {"q": (0, 64), "k": (64, 96), "v": (96, 128)}
    assert len({p.linear.name for p in rows.values()}) == 1
    assert "name of the node" in found["model.layers.0.mlp.up_proj"].why


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_values_alone_tell_the_same(genai_graph: Get, tiny_adapter: Get, precision: str) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    by_name = match(ir.load(genai_graph("llama", precision)), adapter.modules)
    by_values = match(anonymous(ir.load(genai_graph("llama", precision))), adapter.modules)
    assert places(by_values) == places(by_name)
    assert all("values of the weight" in one.why for one in by_values.values())


def test_parts_of_a_module_that_the_graph_splits(exported: Get, tiny_adapter: Get) -> None:
    adapter = Adapter.load(tiny_adapter("phi3"))
    marked = match(without_branches(ir.load(exported("phi3") / "model.onnx")), adapter.modules)
    fused = marked["model.layers.0.mlp.gate_up_proj"]
    assert [piece.linear.out_features for piece in fused.pieces] == [96, 96]
    assert MODULE in fused.why
    assert [part["rows"] for part in fused.describe()["parts"]] == [[0, 96], [96, 192]]  # type: ignore[attr-defined]
    unmarked = anonymous(without_branches(ir.load(exported("phi3") / "model.onnx")))
    assert places(match(unmarked, adapter.modules)) == places(marked)


def without_branches(model: ir.Model) -> ir.Model:
    for node in list(model.graph):
        if node.op_type == "BlockDiagMatMul":
            base = node.inputs[2]
            assert base is not None
            node.outputs[0].replace_all_uses_with(base, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
    return model


def test_scopes_of_torch_export(exported: Get, tiny_adapter: Get) -> None:
    adapter = Adapter.load(tiny_adapter("gpt2"))
    model = without_branches(ir.load(exported("gpt2") / "model.onnx"))
    for node in model.graph:
        node.metadata_props.pop(MODULE, None)
    found = match(model, adapter.modules)
    assert {one.why.split(";")[0] for one in found.values()} == {"torch.onnx scope of the node"}
    assert all(one.pieces[0].whole for one in found.values())
    assert places(match(anonymous(model), adapter.modules)) == places(found)


# ------------------------------------------------------------------------------------------- graphs made by hand


def weight(out_features: int, in_features: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(out_features, in_features)).astype(np.float32)


def module(name: str, values: Array, samples: bool = True) -> AdaptedModule:
    shape = BlockShape.for_linear(values.shape[1], values.shape[0], 4)
    blocks = np.ones(shape.blocks, np.float32)
    return AdaptedModule(name, blocks, values.shape[1], values.shape[0], fingerprint(values) if samples else None)


def graph(layers: dict[str, Array], bits: int = 0, **attributes: int) -> ir.Model:
    """One node per named weight (out, in), all on one input: MatMul, or MatMulNBits."""
    width = next(iter(layers.values())).shape[1]
    x = ir.Value(name="x", shape=ir.Shape(["rows", width]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, initializers = [], []

    def stored(name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        initializers.append(value)
        return value

    for name, array in layers.items():
        if not bits:
            node = ir.Node("", "MatMul", [x, stored(f"{name}.w", np.ascontiguousarray(array.T))], name=name)
        else:
            grid = quantize(array, bits, 16, symmetric=False)
            assert grid.zero_points is not None
            pieces: dict[str, Array] = {"q": grid.codes, "s": grid.scales, "z": grid.zero_points}
            values = [stored(f"{name}.{key}", piece) for key, piece in pieces.items()]
            numbers = {"K": width, "N": len(array), "bits": bits, "block_size": 16, **attributes}
            attrs = [ir.AttrInt64(key, number) for key, number in numbers.items()]
            node = ir.Node("com.microsoft", "MatMulNBits", [x, *values], attrs, name=name)
        node.outputs[0].name, node.outputs[0].type = f"{name}/out", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["rows", len(array)])
        nodes.append(node)
    made = ir.Graph(
        [x],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 21},
        name="made",
    )
    return ir.Model(made, ir_version=10)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sampled_positions_of_quantized_weights(bits: int) -> None:
    values = weight(24, 40, 0)  # 40 inputs: the last group of 16 is padded
    (layer,) = linears(graph({"a": values}, bits))
    rows, columns = np.divmod(np.arange(24 * 40), 40)
    grid = quantize(values, bits, 16, symmetric=False)
    from diablo_export.quantization import dequantize

    assert np.array_equal(layer.values_at(rows, columns).reshape(24, 40), dequantize(grid))


@pytest.mark.parametrize("bits", [0, 4])
def test_a_module_inside_a_fused_weight_is_found_by_its_values(bits: int) -> None:
    parts = [weight(rows, 64, rows) for rows in (64, 24, 40)]
    found = match(graph({"fused": np.concatenate(parts)}, bits), {"m.k": module("m.k", parts[1])})
    assert (found["m.k"].pieces[0].start, found["m.k"].pieces[0].stop) == (64, 88)


@pytest.mark.parametrize(("adapted", "rows"), [("q", (0, 64)), ("k", (64, 96)), ("v", (96, 128))])
def test_one_of_a_fused_three_without_samples(adapted: str, rows: tuple[int, int]) -> None:
    sizes = {"q": 64, "k": 32, "v": 32}
    name = f"model.layers.0.self_attn.{adapted}_proj"
    modules = {name: module(name, weight(sizes[adapted], 64, 1), samples=False)}
    found = match(graph({"/model/layers.0/attn/qkv_proj/MatMul": weight(128, 64, 0)}), modules)
    assert (found[name].pieces[0].start, found[name].pieces[0].stop) == rows
    assert "no samples to check it" in found[name].why


def test_a_base_in_half_precision_is_the_same_base() -> None:
    values = weight(32, 64, 0)
    half = values.astype(np.float16).astype(np.float32)
    assert match(graph({"/up_proj/MatMul": half}), {"up_proj": module("up_proj", values)})


def test_an_adapter_without_samples_is_matched_by_name_and_size_only() -> None:
    values = weight(32, 64, 0)
    model = graph({"/m/up_proj/MatMul": values, "/m/down_proj/MatMul": values})
    found = match(model, {"m.up_proj": module("m.up_proj", values, samples=False)})
    assert found["m.up_proj"].pieces[0].linear.name == "/m/up_proj/MatMul"
    for other in ("m.other", "model.layers.0.m.up_proj"):  # two words are every layer's
        with pytest.raises(MatchError, match=rf"{other}: no node has its name, and the adapter carries no samples"):
            match(model, {other: module(other, values, samples=False)})


def test_every_missing_module_is_listed_with_its_reason() -> None:
    values = [weight(32, 64, seed) for seed in range(4)]
    model = graph({"/m/a/MatMul": values[0], "/m/b/MatMul": values[1]})
    modules = {
        "m.a": module("m.a", values[2]),
        "m.b": dataclasses.replace(module("m.b", values[1]), out_features=16, blocks=np.ones((4, 16, 4), np.float32)),
        "m.c": module("m.c", values[3]),
    }
    with pytest.raises(MatchError) as caught:
        match(model, modules)
    text = str(caught.value)
    assert "3 of the 3 adapted modules" in text
    assert "m.a: /m/a/MatMul (name of the node) has other values than the base weight (cosine of 64 samples" in text
    assert "m.b: /m/b/MatMul (name of the node) is 64 → 32, the adapter's module is 64 → 16" in text
    assert "m.c: no linear node has the values of its base weight (64 → 32; 2 places of that size" in text
    assert "Give the ONNX model of the very base" in text


def test_a_weight_that_an_adapter_was_merged_into_is_not_the_base() -> None:
    values = weight(32, 64, 0)
    merged = values.copy()
    merged[:8, :16] += 0.05  # small: the cosine of the samples stays above 0.99
    with pytest.raises(MatchError, match="other values than the base weight"):
        match(graph({"/m/a/MatMul": merged}), {"m.a": module("m.a", values)})


def test_two_nodes_with_the_same_values_are_not_guessed_between() -> None:
    values = weight(32, 64, 0)
    with pytest.raises(MatchError, match="several nodes have its values: first, second"):
        match(graph({"first": values, "second": values}), {"m.a": module("m.a", values)})


def test_marked_parts_are_joined_by_their_rows_whatever_the_order_of_nodes() -> None:
    values = weight(64, 64, 0)
    model = graph({"second": values[40:], "first": values[:40]})
    for node, rows in zip(model.graph, ("40:64", "0:40"), strict=True):
        node.metadata_props.update({MODULE: "m.gate_up_proj", ROWS: rows})
    found = match(model, {"m.gate_up_proj": module("m.gate_up_proj", values, samples=False)})["m.gate_up_proj"]
    assert [piece.linear.name for piece in found.pieces] == ["first", "second"]


@pytest.mark.parametrize("names", [("/m/gate_proj/MatMul", "/m/up_proj/MatMul"), ("first", "second")])
def test_parts_that_read_other_inputs_are_not_the_module(names: tuple[str, str]) -> None:
    """By their names, and by values alone: the branch has one input."""
    values = weight(64, 64, 0)
    modules = {"m.gate_up_proj": module("m.gate_up_proj", values)}
    model = graph(dict(zip(names, (values[:32], values[32:]), strict=True)))
    assert len(match(model, modules)["m.gate_up_proj"].pieces) == 2
    second = linears(model)[1].node
    negative = ir.node("Neg", [second.inputs[0]])
    model.graph.insert_before(second, negative)
    second.replace_input_with(0, negative.outputs[0])
    named = "do not share one input; " if "gate" in names[0] else ""
    with pytest.raises(MatchError, match=f"{named}no linear node has the values"):
        match(model, modules)


def test_a_part_with_few_samples_is_no_evidence() -> None:
    values = weight(64, 64, 0)
    with pytest.raises(MatchError, match="no linear node has the values"):  # some four of 64 samples
        match(graph({"first": values[:60], "second": values[60:]}, 4), {"m.a": module("m.a", values)})


def test_two_modules_never_share_outputs() -> None:
    values = weight(32, 64, 0)
    modules = {name: module(name, values) for name in ("m.a", "m.b")}
    with pytest.raises(MatchError, match=r"m\.b: node is already m\.a"):
        match(graph({"node": values}), modules)


def test_prepacked_weights_are_refused() -> None:
    values = weight(32, 64, 0)
    with pytest.raises(ExportError, match="prepacked for one kind of GPU"):
        match(graph({"a": values}, 4, weight_prepacked=1), {"a": module("a", values)})


def test_reading_samples_does_not_touch_the_checkpoint(genai_graph: Get, tiny_model: Get) -> None:
    # the graph's own weights, sampled where the fingerprint samples, are the checkpoint's
    info = Checkpoint.open(tiny_model("llama")).tensors["model.layers.0.mlp.up_proj.weight"].read()
    layer = next(one for one in linears(ir.load(genai_graph("llama", "fp32"))) if "layers.0/mlp/up" in one.name)
    rows, columns = np.divmod(np.arange(info.size), info.shape[1])
    assert np.array_equal(layer.values_at(rows, columns).reshape(info.shape), info)


def test_a_weight_behind_an_identity_is_one() -> None:
    """torch's older exporter has a weight that several layers share once, and an Identity for each of the others."""
    values = weight(32, 64, 0)
    model = graph({"/m/a/query/MatMul_Q4": values, "/m/a/query_1/MatMul": values})
    first, second = (layer.node for layer in linears(model))
    copied = ir.node("Identity", [first.inputs[1]])
    model.graph.insert_before(second, copied)
    second.replace_input_with(1, copied.outputs[0])
    found = match(model, {"m.a.query": module("m.a.query", values)})["m.a.query"]
    assert [layer.node for layer in found.again] == [second] and found.again[0].weight is first.inputs[1]
