from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from diablo_export import opschema
from diablo_export.blockdiag import Array, BlockShape, apply

LEVELS = ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]
# leading shape of X, K, N, num_blocks asked for: sizes that divide, one side padded, both, and uncovered outputs
CASES = [
    ((2, 3), 16, 32, 4),
    ((), 8, 8, 2),
    ((5,), 9, 10, 4),
    ((1, 1), 100, 60, 7),
    ((3,), 9, 100, 4),
    ((2, 3, 2), 65, 64, 64),
    ((4,), 12, 8, 1),
]


def one_node(lead: tuple[int, ...], k: int, n: int, opset: int = 22, dtype: int = onnx.TensorProto.FLOAT) -> bytes:
    """A model of the one node, its D an overridable initializer that is empty by default."""
    free = [None] * len(lead)
    inputs = [
        helper.make_tensor_value_info("X", dtype, [*free, k]),
        helper.make_tensor_value_info("D", dtype, ["num_blocks", "block_size_in", "block_size_out"]),
        helper.make_tensor_value_info("Y0", dtype, [*free, n]),
    ]
    node = helper.make_node(opschema.NAME, list(opschema.INPUTS), list(opschema.OUTPUTS), domain=opschema.DOMAIN)
    output = helper.make_tensor_value_info("Y", dtype, [*free, n])
    graph = helper.make_graph([node], "g", inputs, [output], [helper.make_tensor("D", dtype, [0, 0, 0], [])])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(opschema.DOMAIN, opschema.VERSION)]
    model = helper.make_model(
        graph, functions=[opschema.function(opset)], opset_imports=imports, ir_version=opschema.MIN_IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def session(model: bytes, level: str = "ORT_ENABLE_ALL") -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def values(
    lead: tuple[int, ...], k: int, n: int, num_blocks: int, dtype: Any = np.float32
) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(0)
    shape = BlockShape.for_linear(k, n, num_blocks)
    sizes = ((*lead, k), shape.blocks, (*lead, n))
    made: list[Array] = [random.normal(size=size).astype(dtype) for size in sizes]
    return made[0], made[1], made[2]


@pytest.mark.parametrize(("lead", "k", "n", "num_blocks"), CASES)
def test_body_agrees_with_numpy_everywhere(lead: tuple[int, ...], k: int, n: int, num_blocks: int) -> None:
    model = one_node(lead, k, n)
    x, blocks, y0 = values(lead, k, n, num_blocks)
    wanted = apply(x, blocks, n, y0)
    feeds = {"X": x, "D": blocks, "Y0": y0}
    runs = [ReferenceEvaluator(onnx.load_from_string(model)), *(session(model, level) for level in LEVELS)]
    for runner in runs:
        got = runner.run(None, feeds)[0]
        assert got.shape == wanted.shape
        # sums of at most 15 products of values near 1 in float32, in another order: 15 · 2⁻²³ · 10
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
        assert not np.allclose(got, y0)


@pytest.mark.parametrize("level", LEVELS)
def test_empty_blocks_give_y0_bit_for_bit(level: str) -> None:
    runner = session(one_node((2, 3), 100, 60), level)
    x, blocks, y0 = values((2, 3), 100, 60, 7)
    assert np.array_equal(runner.run(None, {"X": x, "Y0": y0})[0], y0)
    runner.run(None, {"X": x, "D": blocks, "Y0": y0})  # memory that was used before must not show through
    assert np.array_equal(runner.run(None, {"X": x, "Y0": y0})[0], y0)


@pytest.mark.parametrize("level", LEVELS)
def test_no_rows_give_no_rows(level: str) -> None:
    # onnxruntime's fused Transpose and MatMul would divide by zero here and end the process
    x, blocks, y0 = values((0, 4), 8, 8, 2)
    assert session(one_node((0, 4), 8, 8), level).run(None, {"X": x, "D": blocks, "Y0": y0})[0].shape == (0, 4, 8)


def test_any_block_count_in_one_session() -> None:
    runner = session(one_node((3,), 48, 24))
    for num_blocks in (1, 4, 5, 8, 24):
        x, blocks, y0 = values((3,), 48, 24, num_blocks)
        got = runner.run(None, {"X": x, "D": blocks, "Y0": y0})[0]
        # sums of at most 48 products of values near 1 in float32: 48 · 2⁻²³ · 10
        np.testing.assert_allclose(got, apply(x, blocks, 24, y0), rtol=0, atol=6e-5)


def test_float16() -> None:
    x, blocks, y0 = values((2, 3), 9, 10, 4, np.float16)
    runner = session(one_node((2, 3), 9, 10, dtype=onnx.TensorProto.FLOAT16))
    got = runner.run(None, {"X": x, "D": blocks, "Y0": y0})[0]
    assert got.dtype == np.float16
    wanted = apply(x.astype(np.float32), blocks.astype(np.float32), 10, y0.astype(np.float32))
    # three products and a sum near 10, each rounded to 2⁻¹¹ of itself
    np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=0, atol=10 * 4 * 2**-11)


@pytest.mark.parametrize("opset", [15, 18, 21, 24])
def test_opsets(opset: int) -> None:
    x, blocks, y0 = values((2,), 9, 10, 4)
    got = session(one_node((2,), 9, 10, opset)).run(None, {"X": x, "D": blocks, "Y0": y0})[0]
    np.testing.assert_allclose(got, apply(x, blocks, 10, y0), rtol=0, atol=1e-5)  # 3 products near 1, float32


def test_an_older_opset_gets_the_oldest_body_that_works() -> None:
    assert opschema.function(11).opset_import[0].version == opschema.MIN_OPSET


def test_numpy_twin_takes_the_place_of_the_body() -> None:
    x, blocks, y0 = values((2,), 9, 10, 4)
    model = onnx.load_from_string(one_node((2,), 9, 10))
    del model.functions[:]  # only the twin is left
    twin = ReferenceEvaluator(model, new_ops=[opschema.BlockDiagMatMul])
    (got,) = twin.run(None, {"X": x, "D": blocks, "Y0": y0})
    assert np.array_equal(np.asarray(got), apply(x, blocks, 10, y0))


def test_contract() -> None:
    proto = opschema.function()
    assert (proto.domain, proto.name) == ("ai.diablo", "BlockDiagMatMul")
    assert (
        (tuple(proto.input), tuple(proto.output)) == (opschema.INPUTS, opschema.OUTPUTS) == (("X", "D", "Y0"), ("Y",))
    )
    assert opschema.input_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj.diablo_blocks"
    domains = {node.domain for node in proto.node}
    assert domains == {""}, "the body must be in standard operators alone"
