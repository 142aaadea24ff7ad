"""Modules in graphs that nobody marked: nodes by their weights' values, outputs among the values behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from diablo_export.fingerprint import sample
from diablo_export.measure.foreign_places import End, Found, Wanted, ends, find
from diablo_export.measure.places import Graph
from diablo_export.quantization import quantize

W: Any = np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32)  # three weights (out, in)


def graph(file: Path, text: str, **weights: Any) -> Graph:
    model = parse_model(f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save(model, file)
    return Graph(file)


def wanted(weight: Any, other: Any = None) -> Wanted:
    both = (weight,) if other is None else (weight, other)
    return Wanted(*weight.shape, tuple(sample(each) for each in both))


def test_a_node_is_known_by_its_weight_in_any_layout(tmp_path: Path) -> None:
    text = """g (float[1, t, 16] x) => (float[1, t, 16] d) {
        wt = Transpose<perm = [1, 0]>(w)
        a = MatMul(x, wt)
        b = Gemm<transB = 1>(a, v)
        c = com.microsoft.MatMulNBits<K = 16, N = 16, bits = 4, block_size = 16>(b, codes, scales)
        d = MatMul(c, other)
    }"""
    codes = quantize(W[2], 4, 16)
    packed = {"codes": codes.codes, "scales": codes.scales}
    here = graph(tmp_path / "a.onnx", text, w=W[0], v=W[1], other=W[0].T * -1, **packed)
    found, reasons = find(here, {name: wanted(weight) for name, weight in zip("ijk", W, strict=True)})
    assert {name: (one.node.output[0], one.rows) for name, one in found.items()} == {
        "i": ("a", (0, 16)),
        "j": ("b", (0, 16)),
        "k": ("c", (0, 16)),
    }
    assert not reasons


def test_a_weight_that_holds_several_modules_and_one_that_was_merged(tmp_path: Path) -> None:
    fused = np.ascontiguousarray(np.concatenate([W[0], W[1], W[2]]).T)  # (in, 48)
    here = graph(tmp_path / "a.onnx", "g (float[1, t, 16] x) => (float[1, t, 48] y) { y = MatMul(x, w) }", w=fused)
    other = W[1] + np.float32(3) * W[0][::-1]  # unlike what is stored; as tuned it is like it
    found, _ = find(here, {"q": wanted(W[0]), "k": wanted(other, W[1]), "v": wanted(W[2])})
    assert {name: one.rows for name, one in found.items()} == {"q": (0, 16), "k": (16, 32), "v": (32, 48)}


def test_names_tell_where_values_do_not_and_nothing_is_guessed(tmp_path: Path) -> None:
    text = """g (float[1, t, 16] x) => (float[1, t, 16] c) {
        a = MatMul(x, w)
        b = MatMul(a, w2)
        c = MatMul(b, v)
    }"""
    here = graph(tmp_path / "a.onnx", text, w=W[0].T.copy(), w2=W[0].T.copy(), v=W[1])
    names = ["/model/layers.0/attn/q_proj/MatMul", "/model/layers.1/attn/q_proj/MatMul", "/x/MatMul"]
    for node, name in zip(here.proto.graph.node, names, strict=True):
        node.name = name
    same = {f"model.layers.{layer}.self_attn.q_proj": wanted(W[0]) for layer in (0, 1)}
    found, reasons = find(here, {**same, "lm_head": wanted(W[2]), "twice": wanted(W[0])})
    assert [one.node.output[0] for one in found.values()] == ["a", "b"]
    assert reasons["twice"] == "several nodes have its values"
    assert reasons["lm_head"].startswith(
        "no MatMul or Gemm or MatMulNBits has its weight's values, or its name (16 → 16"
    )
    broken, _ = find(here, {"model.layers.1.self_attn.q_proj": wanted(W[2])})
    assert broken["model.layers.1.self_attn.q_proj"].node.output[0] == "b"


LORA = """g (float[1, t, 16] x, float[1, t, 16] r) => (float[1, t, 16] z) {
    y = MatMul(x, w)
    p = MatMul(x, a)
    q = MatMul(p, b)
    s = Mul(q, scale)
    l = Add(y, s)
    m = Mul(l, magnitude)
    o = Add(m, bias)
    z = Add(o, r)
}"""


def test_outputs_are_looked_for_behind_what_adapters_are_made_of_and_no_further(tmp_path: Path) -> None:
    small = {"a": W[0][:, :2].copy(), "b": W[1][:2].copy(), "scale": np.float32(2).reshape(1)}
    vectors = {"magnitude": W[0][0], "bias": W[0][1]}
    here = graph(tmp_path / "a.onnx", LORA, w=W[0], **small, **vectors)
    (node,) = (n for n in here.proto.graph.node if n.output[0] == "y")
    kinds = [(end.y, end.products) for end in ends(here, Found(node, (0, 16)))]
    assert kinds == [("y", "none"), ("l", "float"), ("m", "float"), ("o", "float")]  # r is another part of the network


def test_what_is_computed_from_stored_values_alone_is_no_other_part_of_the_network(tmp_path: Path) -> None:
    """DoRA's norms, as torch exports them where the adapter was not merged."""
    text = """g (float[1, t, 16] x, float[1, t, 16] r) => (float[1, t, 16] z) {
        y = MatMul(x, w)
        norm = ReduceL2<keepdims = 0>(v, axes)
        by = Div(magnitude, norm)
        m = Mul(y, by)
        other = ReduceL2(r, axes)
        z = Mul(m, other)
    }"""
    stored = {"w": W[0], "v": W[0] + W[1], "magnitude": W[0][0], "axes": np.array([0])}
    here = graph(tmp_path / "a.onnx", text, **stored)
    assert [end.y for end in ends(here, Found(here.proto.graph.node[0], (0, 16)))] == ["y", "m"]


def test_a_run_of_a_split_value_is_followed(tmp_path: Path) -> None:
    text = """g (float[1, t, 16] x) => (float[1, t, 16] q, float[1, t, 16] v) {
        y = MatMul(x, w)
        q, v = Split<axis = -1>(y, sizes)
    }"""
    fused = np.ascontiguousarray(np.concatenate([W[0], W[1]]).T)
    here = graph(tmp_path / "a.onnx", text, w=fused, sizes=np.array([16, 16]))
    found = Found(here.proto.graph.node[0], (16, 32))
    assert ends(here, found) == [End("y", 16, 32, "none"), End("v", 0, 16, "none")]


@pytest.mark.parametrize(
    ("reader", "inside"),
    [
        ("com.microsoft.SkipLayerNormalization(y, x, g, g, g)", "SkipLayerNormalization"),
        ("com.microsoft.SkipLayerNormalization(y, x, g, g)", None),
        ("com.microsoft.BiasGelu(y, g)", "BiasGelu"),
        ("Add(y, g)", None),
    ],
)
def test_a_bias_that_another_operator_adds_is_seen(reader: str, inside: str | None, tmp_path: Path) -> None:
    text = f"g (float[1, t, 16] x) => (float[1, t, 16] z) {{ y = MatMul(x, w)\n z = {reader} }}"
    here = graph(tmp_path / "a.onnx", text, w=W[0], g=W[0][0])
    assert here.hidden_bias(here.proto.graph.node[0]) == inside
