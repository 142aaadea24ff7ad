"""int4 layers and their branches as one node: the same numbers on any ONNX Runtime, with kernels and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from diablo_export import opschema, runtime
from diablo_export.blockdiag import BlockShape, apply
from diablo_export.converters.onnx_fuse import fuse, fuse_file
from diablo_export.errors import ExportError
from diablo_export.quantization import Quantized, dequantize, quantize

K, N, BLOCKS = 96, 64, 4
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def layer(bits: int = 4, group: int = 32, symmetric: bool = True) -> Quantized:
    weight = np.random.default_rng(1).normal(size=(N, K)).astype(np.float32)
    return quantize(weight, bits, group, symmetric)


def graph(stored: Quantized, element: int = HALF, tapped: bool = False, blocks: int | None = None) -> onnx.ModelProto:
    """Y = X · W + X · blockdiag(D), D fed and empty by default; `tapped`: the layer's output is one of the model's."""
    dtype, blocks = np.float16 if element == HALF else np.float32, blocks or element
    value, array = helper.make_tensor_value_info, numpy_helper.from_array
    tensors = {"B": stored.codes, "scales": stored.scales.astype(dtype)}
    if stored.zero_points is not None:
        tensors["zero_points"] = stored.zero_points
    numbers = {"K": K, "N": N, "bits": stored.bits, "block_size": stored.group_size}
    int8 = blocks == TensorProto.INT8
    fed = ["X", "D", "S", "Y0"] if int8 else ["X", "D", "Y0"]
    nodes = [
        helper.make_node("MatMulNBits", ["X", *tensors], ["Y0"], "layer", domain="com.microsoft", **numbers),
        helper.make_node(opschema.NAME_INT8 if int8 else opschema.NAME, fed, ["Y"], "branch", domain=opschema.DOMAIN),
    ]
    inputs = [value("X", element, ["m", K]), value("D", blocks, ["b", "i", "o"])]
    inputs += [value("S", FLOAT, ["b"])] * int8
    outputs = [value("Y", element, ["m", N])] + [value("Y0", element, ["m", N])] * tapped
    stored_in = [array(tensor, name) for name, tensor in tensors.items()]
    stored_in.append(helper.make_tensor("D", blocks, [0, 0, 0], []))
    made = helper.make_graph(nodes, "g", inputs, outputs, stored_in)
    imports = [helper.make_opsetid(d, v) for d, v in (("", 18), ("com.microsoft", 1), (opschema.DOMAIN, 1))]
    functions = [opschema.function(name=opschema.NAME_INT8 if int8 else opschema.NAME)]
    return helper.make_model(made, functions=functions, opset_imports=imports, ir_version=10)


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = ir.from_proto(model)
    assert fuse(changed) == {"branch": "fused"}
    assert [node.op_type for node in changed.graph] == [opschema.NAME_FUSED]
    proto = ir.to_proto(changed)
    assert isinstance(proto, onnx.ModelProto)
    return proto


def session(model: onnx.ModelProto, library: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        runtime.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(rows: int, dtype: Any = np.float16) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shape = BlockShape.for_linear(K, N, BLOCKS).blocks
    return {"X": random.normal(size=(rows, K)).astype(dtype), "D": random.normal(size=shape).astype(dtype)}


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_body_is_the_two_nodes(rows: int) -> None:
    model, given = graph(layer()), feeds(rows)
    before, after = session(model, False), session(fused(model), False)
    assert np.array_equal(after.run(None, given)[0], before.run(None, given)[0])
    base = {"X": given["X"]}
    assert np.array_equal(after.run(None, base)[0], before.run(None, base)[0])  # no adapter
    assert not np.array_equal(after.run(None, base)[0], after.run(None, given)[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.usefixtures("library")
def test_the_kernel_is_the_weight_and_its_branch(rows: int, dtype: Any, symmetric: bool) -> None:
    """The operator itself, also with zero points, against both in double."""
    stored, given = layer(symmetric=symmetric), feeds(rows, dtype)
    value, array = helper.make_tensor_value_info, numpy_helper.from_array
    element = HALF if dtype == np.float16 else FLOAT
    tensors = {"B": stored.codes, "scales": stored.scales.astype(dtype)}
    names = ["X", "B", "scales", "D"]
    if stored.zero_points is not None:
        tensors["zero_points"] = stored.zero_points
        names.append("zero_points")
    node = helper.make_node(opschema.NAME_FUSED, names, ["Y"], domain=opschema.DOMAIN)
    for name, number in zip(opschema.fused_attributes(), (K, N, 4, stored.group_size, 0), strict=True):
        node.attribute.append(helper.make_attribute(name, number))
    inputs = [value("X", element, ["m", K]), value("D", element, ["b", "i", "o"])]
    made = helper.make_graph(
        [node], "g", inputs, [value("Y", element, ["m", N])], [array(t, name) for name, t in tensors.items()]
    )
    imports = [helper.make_opsetid(d, v) for d, v in (("", 18), ("com.microsoft", 1), (opschema.DOMAIN, 1))]
    functions = [opschema.function(), opschema.fused_function(zero_points=not symmetric)]
    model = helper.make_model(made, functions=functions, opset_imports=imports, ir_version=10)
    weight = dequantize(stored).astype(np.float64).T
    x, blocks = given["X"].astype(np.float64), given["D"].astype(np.float64)
    wanted = apply(x, blocks, N, x @ weight)
    for library in (True, False):
        got = session(model, library).run(None, given)[0]
        assert got.dtype == dtype and got.shape == (rows, N)
        # fp16: scales, x·W and the sum are each rounded to 11 bits, of numbers up to 40; fp32: sums of 120 products
        error = np.abs(got - wanted).max(initial=0)
        assert error <= (0.06 if dtype == np.float16 else 1e-4), (library, error)


@pytest.mark.usefixtures("library")
def test_what_does_not_fit_is_explained() -> None:
    opened, given = session(fused(graph(layer())), True), feeds(3)
    with pytest.raises(Exception, match=r"MatMulNBitsBlockDiag: .*block_size_in is below.*D \(4, 20, 16\), K is 96"):
        opened.run(None, {**given, "D": given["D"][:, :20]})


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (graph(layer(group=16)), "groups of 16"),
        (graph(layer(bits=8)), "8 bits"),
        (graph(layer(), FLOAT), "FLOAT: the kernel multiplies in float16 or bfloat16"),
        (graph(layer(), blocks=TensorProto.INT8), "int8 blocks"),
        (graph(layer(), tapped=True), "somebody else reads"),
    ],
)
def test_what_is_left_as_it_is(model: onnx.ModelProto, why: str) -> None:
    changed = ir.from_proto(model)
    (said,) = fuse(changed).values()
    assert why in said
    assert ir.to_proto(changed).SerializeToString() == ir.to_proto(ir.from_proto(model)).SerializeToString()


def test_files(tmp_path: Path) -> None:
    onnx.save(graph(layer()), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data",
              size_threshold=0)  # fmt: skip
    assert fuse_file(tmp_path / "model.onnx", tmp_path / "fused.onnx") == {"branch": "fused"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused.onnx", "model.onnx", "model.onnx.data"]
    given = feeds(3)
    outputs = [runtime.session(tmp_path / name).run(None, given)[0] for name in ("model.onnx", "fused.onnx")]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=0.06)  # with the library, where there is one
    with pytest.raises(ExportError, match="not in the folder of"):
        fuse_file(tmp_path / "model.onnx", tmp_path / "other" / "fused.onnx")
    with pytest.raises(ExportError, match=r"nothing to fuse:\n  there are no branches"):
        fuse_file(tmp_path / "fused.onnx", tmp_path / "again.onnx")
