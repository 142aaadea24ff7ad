"""Parameters that an adapter brings whole, in graphs that have them under other names or in other forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from diablo_export import runtime
from diablo_export.converters.onnx_head import feed_parameters
from diablo_export.errors import ExportError
from tests.test_onnx_match import graph, weight


def test_a_head_that_the_graph_lacks() -> None:
    model = graph({"classifier": weight(2, 64, 0)})
    saved = {"score.weight": np.zeros((2, 64), np.float32), "classifier.weight": np.zeros((3, 64), np.float32)}
    with pytest.raises(ExportError) as caught:
        feed_parameters(model, saved)
    assert "score.weight: no node of the graph is this module" in str(caught.value)
    assert "classifier.weight: [2, 64] in the graph, [3, 64] in the adapter" in str(caught.value)


def test_a_head_below_a_wrapper_s_name() -> None:
    """Whoever wraps the model before exporting it has one word more before its head's name."""
    saved = {"classifier.weight": np.ones((2, 64), np.float32)}
    model = graph({"/net/classifier/MatMul": weight(2, 64, 0), "/net/pooler/dense/MatMul": weight(64, 64, 1)})
    feed_parameters(model, saved)
    assert np.array_equal(model.graph.initializers["classifier.weight"].const_value.numpy(), np.ones((2, 64)))  # type: ignore[union-attr]
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "MatMul"]
    model = graph({f"/{name}/classifier/MatMul": weight(2, 64, 0) for name in ("one", "other")})
    with pytest.raises(ExportError, match="2 nodes could be this module: /one/classifier/MatMul, /other/"):
        feed_parameters(model, saved)


def test_a_head_that_is_dequantized_under_its_own_name(tmp_path: Path) -> None:
    """Static quantizers give what DequantizeLinear makes the name that the weight had."""
    x = ir.Value(name="x", shape=ir.Shape([3, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = [
        ir.Value(name=name, const_value=ir.tensor(value), shape=ir.Shape(value.shape), type=ir.TensorType(kind))
        for name, value, kind in (
            ("w_q", np.ones((2, 4), np.int8), ir.DataType.INT8),
            ("b_q", np.ones(2, np.int32), ir.DataType.INT32),
            ("s", np.array(0.1, np.float32), ir.DataType.FLOAT),
        )
    ]
    made = [ir.node("DequantizeLinear", [value, stored[2]], name=f"{value.name}/DQ") for value in stored[:2]]
    for node, name in zip(made, ("classifier.weight", "classifier.bias"), strict=True):
        node.outputs[0].name = name
    gemm = ir.node("Gemm", [x, *(node.outputs[0] for node in made)], {"transB": 1}, name="/classifier/Gemm")
    gemm.outputs[0].name, gemm.outputs[0].type = "logits", ir.TensorType(ir.DataType.FLOAT)
    gemm.outputs[0].shape = ir.Shape([3, 2])
    written = ir.Graph([x], gemm.outputs, nodes=[*made, gemm], initializers=stored, opset_imports={"": 21})
    model = ir.Model(written, ir_version=10)
    saved = {"classifier.weight": np.full((2, 4), 2, np.float32), "classifier.bias": np.full(2, 3, np.float32)}
    feed_parameters(model, saved)
    ir.save(model, tmp_path / "model.onnx")
    (found,) = runtime.session(tmp_path / "model.onnx").run(["logits"], {"x": np.ones((3, 4), np.float32)})
    assert np.array_equal(found, np.full((3, 2), 11))
    assert [node.op_type for node in model.graph] == ["Gemm"]
