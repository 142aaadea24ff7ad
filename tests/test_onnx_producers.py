"""Merging into int4 models as other programs make them: what changes, and that nothing else in the file does.

The weights before and after are what onnxruntime computes of the unit vectors, so that it decodes what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization import matmul_nbits_quantizer as producers

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import Array, BlockShape, add_to_weight
from diablo_export.converters.onnx_groups import opened, read
from diablo_export.converters.onnx_linears import Linear, linears, numpy_of
from diablo_export.converters.onnx_match import match
from diablo_export.converters.onnx_merge import onnx_merge
from diablo_export.errors import ExportError
from diablo_export.fingerprint import fingerprint
from diablo_export.measure.given_base import foreign
from diablo_export.quantization import pack, unpack
from diablo_export.requantize import Grid
from tests.test_onnx_merge import touched

OUT, IN = 24, 128  # whole pairs of groups: onnxruntime cannot pack others with RTN, k-quant or GPTQ
Make = Callable[[], onnx.ModelProto]


class Reader:
    """Calibration data, as onnxruntime's GPTQ wants it: an iterable that can be copied."""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        random = np.random.default_rng(7)
        yield {"x": random.normal(size=(64, IN)).astype(np.float32)}


def weights(name: str) -> Array:
    return np.random.default_rng(len(name)).normal(size=(OUT, IN)).astype(np.float32)


def float_model() -> onnx.ModelProto:
    """Two layers on one input, of which only one is adapted."""
    names = ("a", "other")
    nodes = [helper.make_node("MatMul", ["x", f"m.{n}.weight"], [n], name=f"/m/{n}/MatMul") for n in names]
    stored = [numpy_helper.from_array(np.ascontiguousarray(weights(n).T), f"m.{n}.weight") for n in names]
    return _model(nodes, stored)


def _model(nodes: list[Any], stored: list[Any], names: tuple[str, ...] = ("a", "other")) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])
    ys = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", OUT]) for name in names]
    graph = helper.make_graph(nodes, "made", [x], ys, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def made_by(config: Any, **more: Any) -> onnx.ModelProto:
    quantizer = producers.MatMulNBitsQuantizer(float_model(), algo_config=config, **more)
    quantizer.process()
    return quantizer.model.model  # type: ignore[no-any-return]


def default(bits: int, symmetric: bool, size: int, qdq: bool = False, channels: bool = False) -> onnx.ModelProto:
    return made_by(
        producers.DefaultWeightOnlyQuantConfig(
            block_size=size, is_symmetric=symmetric, bits=bits, channel_wised_quantize=channels,
            quant_format=QuantFormat.QDQ if qdq else QuantFormat.QOperator,
        )
    )  # fmt: skip


def per_channel(dtype: int, low: int, high: int, gemm: bool, zeros: bool) -> onnx.ModelProto:
    """One scale for each output, as static quantizers and torch's exporter write them; Gemm takes (out, in)."""
    weight = weights("a") if gemm else weights("a").T
    axis = 0 if gemm else 1
    scales = np.abs(weight).max(1 - axis, keepdims=True) / min(high, (high - low) / 2)
    points = np.full(OUT, (low + high + 1) // 2 + (1 if zeros else 0))
    shaped = points[:, None] if gemm else points[None]
    codes = np.clip(np.rint(weight / scales) + (shaped if zeros else 0), low, high)
    stored = [
        _integers("m.a.weight_q", dtype, codes),
        numpy_helper.from_array(scales.reshape(-1).astype(np.float32), "m.a.weight_s"),
    ]
    if zeros:
        stored.append(_integers("m.a.weight_z", dtype, points))
    source = helper.make_node("DequantizeLinear", [value.name for value in stored], ["w"], axis=axis)
    node = helper.make_node("Gemm" if gemm else "MatMul", ["x", "w"], ["a"], name="/m/a/MatMul")
    if gemm:
        node.attribute.append(helper.make_attribute("transB", 1))
    return _model([source, node], stored, ("a",))


def _integers(name: str, dtype: int, values: Array) -> onnx.TensorProto:
    """Codes as ONNX packs them: flat, low bits first."""
    bits = 8 if dtype in (TensorProto.INT8, TensorProto.UINT8) else 4
    codes = (values.astype(np.int64) & (2**bits - 1)).astype(np.uint8)
    return helper.make_tensor(name, dtype, values.shape, pack(codes.reshape(-1), bits).tobytes(), raw=True)


PRODUCERS: dict[str, Make] = {
    **{
        f"default-{bits}-{'sym' if symmetric else 'asym'}-{size}": partial(default, bits, symmetric, size)
        for bits, symmetric, size in [
            (4, True, 16), (4, False, 32), (4, True, 64), (4, False, 128), (4, True, 256),
            (2, True, 32), (2, False, 16), (8, True, 32), (8, False, 64),
        ]
    },
    "rtn": lambda: made_by(producers.RTNWeightOnlyQuantConfig(), block_size=32),
    "rtn-sym": lambda: made_by(producers.RTNWeightOnlyQuantConfig(), block_size=32, is_symmetric=True),
    "k-quant": lambda: made_by(producers.KQuantWeightOnlyQuantConfig(), block_size=32),
    "gptq": lambda: made_by(producers.GPTQWeightOnlyQuantConfig(Reader()), block_size=32),
    "hqq-4-float-zeros": lambda: made_by(producers.HQQWeightOnlyQuantConfig(block_size=32)),
    "hqq-2-float-zeros": lambda: made_by(producers.HQQWeightOnlyQuantConfig(block_size=16, bits=2)),
    "qdq-int4": lambda: default(4, True, 32, qdq=True),
    "qdq-uint4": lambda: default(4, False, 16, qdq=True),
    "qdq-int4-channels-transposed": lambda: default(4, True, 32, qdq=True, channels=True),
    "qdq-uint4-channels": lambda: default(4, False, 32, qdq=True, channels=True),
    "qdq-int8-gemm": lambda: per_channel(TensorProto.INT8, -128, 127, gemm=True, zeros=False),
    "qdq-int4-matmul": lambda: per_channel(TensorProto.INT4, -8, 7, gemm=False, zeros=False),
    "qdq-uint4-gemm": lambda: per_channel(TensorProto.UINT4, 0, 15, gemm=True, zeros=True),
}  # fmt: skip


def save(model: onnx.ModelProto, file: Path) -> None:
    onnx.save(
        model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=0, convert_attribute=False
    )


def dense(file: Path) -> Array:
    """The adapted layer's weight (out, in), as onnxruntime has it."""
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found: Array = session.run(["a"], {"x": np.eye(IN, dtype=np.float32)})[0]
    return found.T


def layer(file: Path) -> Linear:
    return next(one for one in linears(ir.load(file)) if one.name.startswith("/m/a/"))


def elements(one: Linear) -> Iterator[tuple[ir.Value, Array, bool]]:
    """Each initializer with its values one by one as (out, groups or inputs), and whether those are of inputs."""
    groups = -(-one.in_features // one.group_size)
    for value in one.stored:
        values = np.array(numpy_of(value))
        if one.layout == "DequantizeLinear":
            codes = value is one.weight
            values = values.astype(np.float32)
            yield value, (values.T if one.transposed and values.ndim == 2 else values).reshape(OUT, -1), codes
        elif values.dtype == np.uint8:
            count = groups * one.group_size if value is one.weight else groups
            yield value, unpack(values.reshape(OUT, -1), one.bits, count)[:, : one.in_features], value is one.weight
        else:
            yield value, values.reshape(OUT, -1), False


def module(num_blocks: int) -> AdaptedModule:
    shape = BlockShape.for_linear(IN, OUT, num_blocks)
    blocks = np.random.default_rng(1).normal(size=shape.blocks).astype(np.float32)
    return AdaptedModule("m.a", blocks, IN, OUT, fingerprint(weights("a")))


@pytest.mark.parametrize("num_blocks", [4, 5])  # 4: blocks of 32 inputs; 5: blocks of 26, which end inside groups
@pytest.mark.parametrize("producer", PRODUCERS)
def test_only_touched_groups_change(producer: str, num_blocks: int, tmp_path: Path) -> None:
    file, one = tmp_path / "model.onnx", module(num_blocks)
    save(PRODUCERS[producer](), file)
    raw = np.fromfile(tmp_path / "model.onnx.data", np.uint8)
    before, old = dense(file), layer(file)
    kept = [(value.name, values.copy(), of_inputs) for value, values, of_inputs in elements(old)]
    (entry,) = onnx_merge(file, Adapter({"m.a": one}))
    after, new = dense(file), layer(file)

    met = touched(one.shape, old.group_size)
    weight_met = np.repeat(met, old.group_size, 1)[:, :IN]
    assert entry["why"].startswith(f"requantized {met.sum()} of {met.size} groups")
    assert np.array_equal(after[~weight_met], before[~weight_met])
    for (name, was, of_inputs), (value, now, _) in zip(kept, elements(new), strict=True):
        mask = weight_met if of_inputs else met
        assert value.name == name and np.array_equal(now[~mask], was[~mask])
    inside = np.zeros(len(raw), bool)
    for value in old.stored:
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        inside[tensor.offset : (tensor.offset or 0) + (tensor.length or 0)] = True
    now = np.fromfile(tmp_path / "model.onnx.data", np.uint8)
    assert len(now) == len(raw) and np.array_equal(now[~inside], raw[~inside])

    wanted = add_to_weight(before, one.blocks)
    groups = np.pad(wanted, ((0, 0), (0, -IN % old.group_size))).reshape(OUT, -1, old.group_size)
    # a symmetric grid spans twice the largest weight, and reaches one step less far on one side
    step = np.repeat(2 * np.abs(groups).max(-1) / (2**old.bits - 1), old.group_size, 1)[:, :IN]
    assert (np.abs(after - wanted) <= 1.05 * step)[weight_met].all()
    effect, delta = after - before, wanted - before
    gain = float((effect * delta).sum() / (delta**2).sum())
    assert gain == pytest.approx(1, abs=0.25 if old.bits == 2 else 0.1)  # what rounding leaves of N(0, 1) blocks


@pytest.mark.parametrize("producer", ["hqq-4-float-zeros", "qdq-uint4", "qdq-int4-channels-transposed"])
def test_grids_are_what_onnxruntime_computes(producer: str, tmp_path: Path) -> None:
    save(PRODUCERS[producer](), tmp_path / "model.onnx")
    found = match(ir.load(tmp_path / "model.onnx"), {"m.a": module(4)})["m.a"]
    values = read(found, tmp_path).values().reshape(OUT, -1)[:, :IN]
    # (code − zero) · scale, in onnxruntime perhaps as code · scale − zero · scale
    np.testing.assert_allclose(values, dense(tmp_path / "model.onnx"), rtol=0, atol=1e-5)


def test_initializers_inside_the_model(tmp_path: Path) -> None:
    onnx.save(PRODUCERS["qdq-uint4"](), tmp_path / "model.onnx")
    before, one = dense(tmp_path / "model.onnx"), module(4)
    onnx_merge(tmp_path / "model.onnx", Adapter({"m.a": one}))
    after = dense(tmp_path / "model.onnx")
    changed = after != before
    assert changed.any() and not changed[~np.repeat(touched(one.shape, 16), 16, 1)].any()


@pytest.mark.parametrize("producer", ["default-4-sym-16", "hqq-4-float-zeros", "qdq-uint4", "qdq-int4"])
def test_parity_sees_what_a_merge_should_have_left_alone(producer: str, tmp_path: Path) -> None:
    parity_sees(producer, tmp_path, lambda grid: replace(grid, codes=grid.codes ^ np.uint8(1)))


@pytest.mark.parametrize(
    ("producer", "part"),
    [(name, part) for name in ("rtn", "hqq-4-float-zeros", "qdq-uint4") for part in ("scales", "zeros")]
    + [("default-4-sym-16", "scales"), ("qdq-int4", "scales")],
)
def test_parity_sees_groups_whose_grid_a_merge_should_have_left_alone(producer: str, part: str, tmp_path: Path) -> None:
    def move(grid: Grid) -> Grid:
        values = getattr(grid, part)
        moved = values * 1.25 if part == "scales" else values + 1
        return replace(grid, **{part: moved.astype(values.dtype)})

    parity_sees(producer, tmp_path, move)


def parity_sees(producer: str, tmp_path: Path, change: Callable[[Grid], Grid]) -> None:
    """A merge is as it should be until a group that no block meets is changed."""
    given, merged, adapter = tmp_path / "given.onnx", tmp_path / "model.onnx", Adapter({"m.a": module(4)})
    for file in (given, merged):
        onnx.save(PRODUCERS[producer](), file)
    entries = onnx_merge(merged, adapter)
    assert foreign(given, merged, entries, adapter) == []
    model = ir.load(merged)
    stored = opened(next(one for one in linears(model) if one.name.startswith("/m/a/")), tmp_path)
    last = slice(IN // layer(given).group_size - 1, None)  # the first output's block reads the first inputs
    stored.put(slice(1), last, change(stored.part(slice(1), last)))
    stored.close()
    ir.save(model, merged)
    assert foreign(given, merged, entries, adapter) == ["m.a"]


def _edited(**attributes: int) -> onnx.ModelProto:
    """The model with int4 codes and a DequantizeLinear of other attributes."""
    model = PRODUCERS["qdq-int4-matmul"]()
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return model


def _scales(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    stored = next(value for value in model.graph.initializer if value.name == "m.a.weight_s")
    stored.CopyFrom(numpy_helper.from_array(np.full(shape, 0.3, np.float32), stored.name))
    return model


def _unsigned() -> onnx.ModelProto:
    return per_channel(TensorProto.UINT4, 0, 15, gemm=False, zeros=False)


def _shared() -> onnx.ModelProto:
    model = PRODUCERS["qdq-int4-matmul"]()
    model.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["twin"], name="tied"))
    model.graph.output.append(helper.make_tensor_value_info("twin", TensorProto.FLOAT, ["rows", OUT]))
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: _scales(_edited(axis=1, block_size=8), (IN, 3)), "its groups run along the outputs"),
        (lambda: _scales(_edited(axis=0), (IN,)), "it has one scale for each input"),
        (lambda: _scales(_edited(), ()), "it has one scale for the whole weight"),
        (_unsigned, "its codes are unsigned and have no zero points"),
        (_shared, "its weight is shared with tied"),
    ],
)
def test_weights_that_blocks_cannot_be_merged_into(make: Make, why: str, tmp_path: Path) -> None:
    onnx.save(make(), tmp_path / "model.onnx")
    one = AdaptedModule("m.a", module(4).blocks, IN, OUT)  # without samples: these grids hold other values
    with pytest.raises(ExportError, match=f"/m/a/MatMul: {why}"):
        onnx_merge(tmp_path / "model.onnx", Adapter({"m.a": one}))


class Ranges(CalibrationDataReader):  # type: ignore[misc]
    """What static quantization takes the ranges of activations from."""

    def __init__(self) -> None:
        self.left = [{"x": np.random.default_rng(3).normal(size=(64, IN)).astype(np.float32) * 3}]

    def get_next(self) -> dict[str, Array] | None:
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_a_bias_on_the_grid_of_its_weight_goes_with_it(kind: Any, tmp_path: Path) -> None:
    """onnxruntime adds a Gemm's int32 bias to its int32 sums, whatever scales the bias has of its own."""
    random = np.random.default_rng(0)
    stored = [weights("a"), random.normal(size=OUT).astype(np.float32) * 30]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["a"], name="/m/a/Gemm", transB=1)
    names = [numpy_helper.from_array(value, name) for value, name in zip(stored, "wb", strict=True)]
    onnx.save(_model([node], names, ("a",)), tmp_path / "float.onnx")
    given = tmp_path / "model.onnx"
    options = {"per_channel": True, "weight_type": kind, "activation_type": QuantType.QUInt8, "reduce_range": True}
    quantize_static(str(tmp_path / "float.onnx"), str(given), Ranges(), **options)
    x = {"x": random.normal(size=(16, IN)).astype(np.float32)}
    before, one = _answers(given, x), module(4)
    (entry,) = onnx_merge(given, Adapter({"m.a": one}))
    after = _answers(given, x)
    assert entry["touched_groups"] == OUT
    plain, fused = before
    assert np.abs(plain - fused).max() <= np.abs(plain).max() / 128  # one step of the activations, of 255
    plain, fused = after
    assert np.abs(plain - fused).max() <= np.abs(plain).max() / 128
    effect, wanted = plain - before[0], x["x"] @ add_to_weight(np.zeros((OUT, IN), np.float32), one.blocks).T
    gain = float((effect * wanted).sum() / (wanted**2).sum())
    assert gain == pytest.approx(1, abs=0.02)  # int8 of both sides


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("reduced", [True, False])
def test_codes_stay_within_the_range_that_their_quantizer_chose(reduced: bool, kind: Any, tmp_path: Path) -> None:
    """Seven bits, for processors that would cut off sums of more."""
    onnx.save(float_model(), tmp_path / "float.onnx")
    options = {"per_channel": True, "weight_type": kind, "activation_type": QuantType.QUInt8, "reduce_range": reduced}
    quantize_static(str(tmp_path / "float.onnx"), str(tmp_path / "model.onnx"), Ranges(), **options)
    before, one = _weight(tmp_path / "model.onnx"), module(4)
    onnx_merge(tmp_path / "model.onnx", Adapter({"m.a": one}))
    after = _weight(tmp_path / "model.onnx")
    used = 128 if reduced else 255
    assert used * 0.9 <= int(before.codes.max()) - int(before.codes.min()) <= used
    assert used * 0.9 <= int(after.codes.max()) - int(after.codes.min()) <= used
    assert (int(after.codes.min()) - int(before.codes.min())) in (-1, 0, 1)  # around the same middle
    wanted = add_to_weight(before.values()[:, 0], one.blocks)
    step = 2 * np.abs(wanted).max(-1, keepdims=True) / (127 if reduced else 255)
    assert (np.abs(after.values()[:, 0] - wanted) <= 1.05 * step).all()  # as in test_only_touched_groups_change


def _weight(file: Path) -> Grid:
    return opened(layer(file), file.parent).part(slice(0, OUT), slice(0, 1))


def _answers(file: Path, feeds: dict[str, Array]) -> list[Array]:
    """What onnxruntime makes of a model as it is written, and fused."""
    found = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        found.append(ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run(["a"], feeds)[0])
    return found
