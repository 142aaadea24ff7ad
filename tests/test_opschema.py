from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from diablo_export import opschema
from diablo_export.block_storage import to_int8
from diablo_export.blockdiag import Array, BlockShape, apply

FLOAT, HALF, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
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


def one_node(
    lead: tuple[int, ...], k: int, n: int, opset: int = 22, dtype: int = FLOAT, stored: int | None = None
) -> bytes:
    """A model of the one node, its D (and S, where D is stored in int8) overridable and empty by default."""
    free = [None] * len(lead)
    stored = dtype if stored is None else stored
    inputs = [
        helper.make_tensor_value_info("X", dtype, [*free, k]),
        helper.make_tensor_value_info("D", stored, ["num_blocks", "block_size_in", "block_size_out"]),
        helper.make_tensor_value_info("Y0", dtype, [*free, n]),
    ]
    name, empty = opschema.NAME, [helper.make_tensor("D", stored, [0, 0, 0], [])]
    if stored == INT8:
        name = opschema.NAME_INT8
        inputs.insert(2, helper.make_tensor_value_info("S", FLOAT, ["num_blocks"]))
        empty.append(helper.make_tensor("S", FLOAT, [0], []))
    names = list(opschema.INPUTS_INT8 if stored == INT8 else opschema.INPUTS)
    node = helper.make_node(name, names, list(opschema.OUTPUTS), domain=opschema.DOMAIN)
    output = helper.make_tensor_value_info("Y", dtype, [*free, n])
    graph = helper.make_graph([node], "g", inputs, [output], empty)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(opschema.DOMAIN, opschema.VERSION)]
    function = opschema.function(opset, name)
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=opschema.MIN_IR_VERSION)
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


@pytest.mark.parametrize(("dtype", "stored"), [(FLOAT, HALF), (HALF, HALF)])
def test_whether_there_are_blocks_is_asked_without_casting_them(dtype: int, stored: int, tmp_path: Path) -> None:
    """Size of float16 has no kernel on a CPU: a Cast of all blocks fed it, and onnxruntime up to 1.29 crashed."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(one_node((2,), 16, 32, dtype=dtype, stored=stored), options)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert {node.op_type for node in nodes if {"X", "D"} & {*node.input}} == {"Shape"}


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
    codes, scales = to_int8(blocks)
    feeds = {"X": x, "D": codes, "S": scales, "Y0": y0}
    assert session(one_node((0, 4), 8, 8, stored=INT8), level).run(None, feeds)[0].shape == (0, 4, 8)


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


# ----------------------------------------------------------------------- blocks stored in fewer bits than X has


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("lead", "k", "n", "num_blocks"), CASES)
def test_float16_blocks_beside_float_rows(lead: tuple[int, ...], k: int, n: int, num_blocks: int, level: str) -> None:
    x, blocks, y0 = values(lead, k, n, num_blocks)
    half = blocks.astype(np.float16)
    runner = session(one_node(lead, k, n, stored=HALF), level)
    got = runner.run(None, {"X": x, "D": half, "Y0": y0})[0]
    # the blocks as stored are exact in float32: sums of at most 15 products of values near 1, 15 · 2⁻²³ · 10
    np.testing.assert_allclose(got, apply(x, half.astype(np.float32), n, y0), rtol=0, atol=2e-5)
    assert np.array_equal(runner.run(None, {"X": x, "Y0": y0})[0], y0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("lead", "k", "n", "num_blocks"), CASES)
def test_int8_blocks(lead: tuple[int, ...], k: int, n: int, num_blocks: int, level: str) -> None:
    x, blocks, y0 = values(lead, k, n, num_blocks)
    codes, scales = to_int8(blocks)
    model = one_node(lead, k, n, stored=INT8)
    wanted = apply(x, codes.astype(np.float32) * scales[:, None, None], n, y0)
    feeds = {"X": x, "D": codes, "S": scales, "Y0": y0}
    runner = session(model, level)
    runners: list[Any] = [runner, ReferenceEvaluator(onnx.load_from_string(model))]
    for run in runners:
        # as above: the blocks that the codes stand for, in float32
        np.testing.assert_allclose(run.run(None, feeds)[0], wanted, rtol=0, atol=2e-5)
    assert not np.allclose(wanted, y0)
    assert np.array_equal(runner.run(None, {"X": x, "Y0": y0})[0], y0)
    assert np.array_equal(runner.run(None, {"X": x, "S": scales, "Y0": y0})[0], y0), "S without D is not looked at"


def test_int8_blocks_beside_float16_rows() -> None:
    x, blocks, y0 = values((2, 3), 9, 10, 4, np.float16)
    codes, scales = to_int8(blocks)
    runner = session(one_node((2, 3), 9, 10, dtype=HALF, stored=INT8))
    got = runner.run(None, {"X": x, "D": codes, "S": scales, "Y0": y0})[0]
    assert got.dtype == np.float16
    stored = codes.astype(np.float32) * scales[:, None, None]
    wanted = apply(x.astype(np.float32), stored, 10, y0.astype(np.float32))
    # the blocks, three products and a sum near 10, each rounded to 2⁻¹¹ of itself
    np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=0, atol=10 * 5 * 2**-11)


@pytest.mark.parametrize("opset", [15, 18, 21, 24])
def test_opsets_of_int8_blocks(opset: int) -> None:
    x, blocks, y0 = values((2,), 9, 10, 4)
    codes, scales = to_int8(blocks)
    runner = session(one_node((2,), 9, 10, opset, stored=INT8))
    got = runner.run(None, {"X": x, "D": codes, "S": scales, "Y0": y0})[0]
    wanted = apply(x, codes.astype(np.float32) * scales[:, None, None], 10, y0)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # 3 products near 1, float32


def test_blocks_of_the_same_type_are_not_cast(tmp_path: Path) -> None:
    """The cast for narrower blocks must cost a graph that has none nothing: it is gone before the first run."""
    left = {}
    for name, stored in (("same", FLOAT), ("narrower", HALF)):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / name)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(one_node((3,), 8, 8, stored=stored), options, providers=["CPUExecutionProvider"])
        proto = onnx.load(tmp_path / name)
        inner = next(node for node in proto.graph.node if node.op_type == "If").attribute
        left[name] = [node.op_type for each in inner for node in each.g.node if node.op_type.startswith("Cast")]
    assert left["same"] == [] and "Cast" in left["narrower"]


def test_numpy_twins_of_narrower_blocks() -> None:
    x, blocks, y0 = values((2,), 9, 10, 4)
    codes, scales = to_int8(blocks)
    stored: list[tuple[int, dict[str, Array], Array]] = [
        (HALF, {"D": blocks.astype(np.float16)}, blocks.astype(np.float16).astype(np.float32)),
        (INT8, {"D": codes, "S": scales}, codes.astype(np.float32) * scales[:, None, None]),
    ]
    for kind, feeds, blocks_fed in stored:
        model = onnx.load_from_string(one_node((2,), 9, 10, stored=kind))
        del model.functions[:]
        twin = ReferenceEvaluator(model, new_ops=[opschema.BlockDiagMatMul, opschema.BlockDiagMatMulInt8])
        (got,) = twin.run(None, {"X": x, "Y0": y0, **feeds})
        assert np.array_equal(np.asarray(got), apply(x, blocks_fed, 10, y0))
        (unfed,) = twin.run(None, {"X": x, "Y0": y0})
        assert np.array_equal(np.asarray(unfed), y0)


def test_contract() -> None:
    proto = opschema.function()
    assert (proto.domain, proto.name) == ("ai.diablo", "BlockDiagMatMul")
    assert (
        (tuple(proto.input), tuple(proto.output)) == (opschema.INPUTS, opschema.OUTPUTS) == (("X", "D", "Y0"), ("Y",))
    )
    assert opschema.input_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj.diablo_blocks"
    domains = {node.domain for node in proto.node}
    assert domains == {""}, "the body must be in standard operators alone"
    int8 = opschema.function(name=opschema.NAME_INT8)
    assert (int8.domain, int8.name) == ("ai.diablo", "BlockDiagMatMulInt8")
    assert (tuple(int8.input), tuple(int8.output)) == (("X", "D", "S", "Y0"), ("Y",))
    assert {node.domain for node in int8.node} == {""}
    assert opschema.scales_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj.diablo_scales"
