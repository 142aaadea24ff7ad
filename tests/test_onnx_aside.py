"""What merging cannot see in a graph, or would miss: other operators with weights, and copies inside of branches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

from diablo_export.adapter import Adapter
from diablo_export.converters.export import export
from diablo_export.converters.inspection import inspect
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_aside import unread
from diablo_export.converters.onnx_linears import linears
from diablo_export.converters.onnx_merge import onnx_merge
from diablo_export.errors import MatchError
from tests.test_onnx_producers import _model, module, weights

Make = Callable[[Path], None]


def _stored(name: str, values: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def _matmul(weight: str, y: str = "a") -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", weight], [y], name=f"/m/{y}/MatMul")


def plain(file: Path) -> None:
    onnx.save(_model([_matmul("w")], [_stored("w", weights("a").T)], ("a",)), file)


def dynamic(file: Path) -> None:
    plain(file)
    quantize_dynamic(str(file), str(file))


def cast(file: Path) -> None:
    nodes = [helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT), _matmul("wide")]
    onnx.save(_model(nodes, [_stored("w", weights("a").T.astype(np.float16))], ("a",)), file)


def trained_for_int8(file: Path) -> None:
    """A float weight that is rounded on its way, as training that knows of int8 leaves it."""
    rounding = [helper.make_node(f"{how}Linear", [x, "s"], [y]) for how, x, y in
                (("Quantize", "w", "q"), ("Dequantize", "q", "wide"))]  # fmt: skip
    stored = [_stored("w", weights("a").T), _stored("s", np.array(0.05, np.float32))]
    onnx.save(_model([*rounding, _matmul("wide")], stored, ("a",)), file)


def constant(file: Path) -> None:
    nodes = [helper.make_node("Constant", [], ["w"], value=_stored("", weights("a").T)), _matmul("w")]
    onnx.save(_model(nodes, [], ("a",)), file)


def fused(file: Path) -> None:
    node = helper.make_node("FusedMatMul", ["x", "w"], ["a"], domain="com.microsoft", transB=1)
    model = _model([node], [_stored("w", weights("a"))], ("a",))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, file)


def branch(file: Path, copy: bool = False) -> None:
    """The layer in a branch of If; or as it is, and a copy in the branch."""
    graphs = {
        name: helper.make_graph(
            [_matmul(f"{name}.w", name)], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            [_stored(f"{name}.w", values.T)],
        )
        for name, values in (("then", weights("a")), ("else", weights("other")))
    }  # fmt: skip
    last = "b" if copy else "a"
    choice = helper.make_node(
        "If", ["which"], [last], then_branch=graphs["then"], else_branch=graphs["else"], name="/If"
    )
    nodes, stored = ([_matmul("w"), choice], [_stored("w", weights("a").T)]) if copy else ([choice], [])
    model = _model(nodes, stored, ("a", "b") if copy else ("a",))
    model.graph.input.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    onnx.save(model, file)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (plain, ""),
        (dynamic, "1 MatMulInteger"),
        (cast, "1 MatMul of Cast"),
        (constant, "1 MatMul of Constant"),
        (trained_for_int8, "1 MatMul of DequantizeLinear"),
        (fused, "1 FusedMatMul"),
        (branch, "2 MatMul in branches"),
    ],
)
def test_weights_in_operators_that_are_not_read_are_named(make: Make, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    make(file)
    model = ir.load(file)
    assert unread(model.graph, {layer.node for layer in linears(model)}) == said
    assert inspect(file)["other_weights"] == (said or None)
    if said:
        with pytest.raises(MatchError, match=f"not read here: {said}; export it"):
            onnx_merge(file, Adapter({"m.a": module(4)}))


@pytest.mark.parametrize("own", [True, False])
def test_a_copy_in_a_branch_is_no_silent_loss(own: bool, tmp_path: Path) -> None:
    """Only one of two ways through the graph would have the adapter, merged or beside the weights."""
    file = tmp_path / "model.onnx"
    branch(file, copy=True)
    if not own:
        model = onnx.load(file)
        (then,) = [one.g for one in model.graph.node[1].attribute if one.name == "then_branch"]
        del then.initializer[:]
        then.node[0].input[1] = "w"
        onnx.save(model, file)
    (tmp_path / "adapter").mkdir()
    Adapter({"m.a": module(4)}, num_blocks=4, target_modules=["a"]).save(tmp_path / "adapter")
    for command in (merge, export):
        with pytest.raises(MatchError, match=r"m\.a: /m/then/MatMul, inside of a branch, is this module as well"):
            command(file, tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
