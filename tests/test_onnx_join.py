"""Layers that read the same input as one node: the same numbers as apart, on any ONNX Runtime, and by the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from diablo_export import opschema, runtime
from diablo_export.blockdiag import Array, BlockShape, apply
from diablo_export.converters.onnx_fuse import fuse, fuse_file
from diablo_export.converters.onnx_join import join
from diablo_export.quantization import Quantized, dequantize, quantize

TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


class Layers:
    """Layers of one input, each with a branch that is fed, perhaps with biases between layer and branch."""

    def __init__(
        self,
        inputs: int,
        outputs: list[int],
        symmetric: bool = True,
        biased: bool = False,
        group: int = 32,
        seed: int = 0,
    ) -> None:
        random = np.random.default_rng(seed)
        self.inputs, self.outputs = inputs, outputs
        self.stored = [
            quantize(random.normal(size=(n, inputs)).astype(np.float32), 4, group, symmetric) for n in outputs
        ]
        self.biases = [random.normal(size=n).astype(np.float32) for n in outputs] if biased else []

    def model(self, element: int = TensorProto.FLOAT16) -> onnx.ModelProto:
        value, nodes, tensors = helper.make_tensor_value_info, [], []
        given, made = [value("X", element, ["m", self.inputs])], []
        for i, (n, stored) in enumerate(zip(self.outputs, self.stored, strict=True)):
            names = ["X", *self._weights(stored, str(i), element, tensors)]
            numbers = {"K": self.inputs, "N": n, "bits": 4, "block_size": stored.group_size}
            y0 = f"Y0_{i}"
            nodes.append(helper.make_node("MatMulNBits", names, [y0], domain="com.microsoft", **numbers))
            if self.biases:
                tensors.append(numpy_helper.from_array(self.biases[i].astype(TYPES[element]), f"bias{i}"))
                nodes.append(helper.make_node("Add", [y0, f"bias{i}"], [f"biased{i}"]))
                y0 = f"biased{i}"
            nodes.append(
                helper.make_node(opschema.NAME, ["X", f"D{i}", y0], [f"Y{i}"], f"b{i}", domain=opschema.DOMAIN)
            )
            given.append(value(f"D{i}", element, [f"b{i}", f"i{i}", f"o{i}"]))
            tensors.append(helper.make_tensor(f"D{i}", element, [0, 0, 0], []))
            made.append(value(f"Y{i}", element, ["m", n]))
        graph = helper.make_graph(nodes, "g", given, made, tensors)
        imports = [helper.make_opsetid(d, v) for d, v in (("", 18), ("com.microsoft", 1), (opschema.DOMAIN, 1))]
        return helper.make_model(graph, functions=[opschema.function()], opset_imports=imports, ir_version=10)

    @staticmethod
    def _weights(stored: Quantized, name: str, element: int, tensors: list[Any]) -> list[str]:
        values = {"B": stored.codes, "scales": stored.scales.astype(TYPES[element])}
        if stored.zero_points is not None:
            values["zero_points"] = stored.zero_points
        tensors += [numpy_helper.from_array(value, f"{kind}{name}") for kind, value in values.items()]
        return [f"{kind}{name}" for kind in values]

    def feeds(self, rows: int, blocks: list[int], dtype: Any, seed: int = 0) -> dict[str, Array]:
        """X and blocks of each layer; a count of 0: no adapter there."""
        random = np.random.default_rng(seed)
        made = {"X": random.normal(size=(rows, self.inputs)).astype(dtype)}
        for i, (n, count) in enumerate(zip(self.outputs, blocks, strict=True)):
            if count:
                shape = BlockShape.for_linear(self.inputs, n, count).blocks
                made[f"D{i}"] = random.normal(size=shape).astype(dtype)
        return made

    def wanted(self, given: dict[str, Array]) -> list[Array]:
        """In double."""
        x, made = given["X"].astype(np.float64), []
        for i, stored in enumerate(self.stored):
            y = x @ dequantize(stored).astype(np.float64).T + (self.biases[i] if self.biases else 0)
            blocks = given.get(f"D{i}")
            made.append(y if blocks is None else apply(x, blocks.astype(np.float64), y.shape[1], y))
        return made


def joined(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = ir.from_proto(model)
    assert set(fuse(changed).values()) == {"fused"}
    assert join(changed)
    proto = ir.to_proto(changed)
    assert isinstance(proto, onnx.ModelProto)
    onnx.checker.check_model(proto)
    return proto


def run(model: onnx.ModelProto, given: dict[str, Any], library: bool | Path) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if isinstance(library, Path):
        options.register_custom_ops_library(str(library))
    elif library:
        runtime.register(options)
    opened = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(opened.run(None, given))


@pytest.mark.parametrize(("outputs", "kinds"), [
    ([48, 16], ["Pair"]),
    ([48, 16, 16], ["Triple"]),
    ([48, 16, 16, 40], ["Pair", "Pair"]),
    ([48, 16, 16, 40, 8], ["Triple", "Pair"]),
])  # fmt: skip
def test_nodes_are_joined(outputs: list[int], kinds: list[str]) -> None:
    layers = Layers(64, outputs)
    model = layers.model()
    after = joined(model)
    assert [node.op_type.removeprefix(opschema.NAME_FUSED) for node in after.graph.node] == kinds
    assert [output.name for output in after.graph.output] == [f"Y{i}" for i in range(len(outputs))]
    given = layers.feeds(3, [4] * len(outputs), np.float16)
    for wanted, got in zip(run(model, given, False), run(after, given, False), strict=True):
        assert np.array_equal(wanted, got)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("seed", range(12))
def test_random_calls(seed: int) -> None:
    """Numbers of layers, sizes, blocks, zero points, biases and types at random, against both in double."""
    random = np.random.default_rng(seed)
    pick = lambda most: int(random.integers(1, most + 1))  # noqa: E731
    element, group = [TensorProto.FLOAT, TensorProto.FLOAT16][seed % 2], 32 * 2 ** int(random.integers(3))
    layers = Layers(16 * pick(12), [8 * pick(12) for _ in range(pick(2) + 1)], seed % 3 > 0, seed % 4 > 1, group, seed)
    # In float32 nothing is fused: the kernel does not multiply in it; the operators themselves take it
    model = layers.model(TensorProto.FLOAT16)
    after = joined(model)
    if element == TensorProto.FLOAT:
        after = _widened(after)
    given = layers.feeds(pick(40), [pick(9) - 1 for _ in layers.outputs], TYPES[element], seed)
    wanted = layers.wanted(given)
    for library in (True, False):
        for i, (got, right) in enumerate(zip(run(after, given, library), wanted, strict=True)):
            assert got.dtype == TYPES[element] and got.shape == right.shape
            # fp16: scales, x·W, a bias and the sum are each rounded to 11 bits; fp32: scales were, and sums of 200
            allowed = 4 * 2.0**-11 * (np.abs(right).max() + 1)
            assert np.abs(got - right).max(initial=0) <= allowed, (library, i)


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in float32."""
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_way_on_cuda(
    rows: int, symmetric: bool, library: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators for CUDA, on the CPU and with loops for kernels: few rows in one call, more as dense matrices that
    ONNX Runtime multiplies."""
    stand_in = library.with_name("libdiablo_kernels_stand_in.so")
    if not stand_in.is_file():
        pytest.skip("a library built without its tests")
    monkeypatch.setenv("DIABLO_STAND_IN_SAYS", "1")
    layers = Layers(72, [48, 16, 16, 40, 24], symmetric)
    after = _widened(joined(layers.model()))
    assert [len(node.output) for node in after.graph.node] == [3, 2]
    given = layers.feeds(rows, [4, 0, 7, 2, 3], np.float32)
    for got, right in zip(run(after, given, stand_in), layers.wanted(given), strict=True):
        # Scales were rounded to float16; sums of 72 products
        assert np.abs(got - right).max() <= 2.0**-11 * np.abs(right).max() + 1e-4
    said = capfd.readouterr().err.split("\n")
    assert sorted(filter(None, said)) == (["rows 2", "rows 3"] if rows <= 16 else ["dense 1"] * 5)


def test_what_is_not_joined() -> None:
    """Another input, other groups; and blocks that are computed, which may not be there yet."""
    model = Layers(64, [48, 16]).model()
    model.graph.input.append(helper.make_tensor_value_info("X2", TensorProto.FLOAT16, ["m", 64]))
    for node in model.graph.node[2:]:
        node.input[0] = "X2"
    assert _joins(model) == {}
    other = Layers(64, [48], group=64).model()
    mixed = Layers(64, [48, 16]).model()
    mixed.graph.node[2].attribute[3].i = 64
    by_name = {tensor.name: tensor for tensor in mixed.graph.initializer}
    for source in other.graph.initializer:
        if source.name in ("B0", "scales0"):
            target = by_name[source.name.replace("0", "1")]
            name = target.name
            target.CopyFrom(source)
            target.name = name
    assert _joins(mixed) == {}
    made = Layers(64, [48, 16]).model()
    made.graph.node[3].input[1] = "made"
    made.graph.node.insert(0, helper.make_node("Identity", ["D1"], ["made"]))
    assert _joins(made) == {}


def _joins(model: onnx.ModelProto) -> dict[str, str]:
    changed = ir.from_proto(model)
    fuse(changed)
    return join(changed)


def test_zero_points_of_some_layers_alone() -> None:
    """One function serves all nodes of a model, and it has zero points or none: the most decide."""
    model, other = Layers(64, [48, 16, 16]).model(), Layers(64, [48], symmetric=False).model()
    model.graph.node[0].input.append("zero_points0")
    model.graph.initializer.append(next(t for t in other.graph.initializer if t.name == "zero_points0"))
    changed = ir.from_proto(model)
    assert fuse(changed) == {
        "b0": "the layer has zero points, unlike most of the model's",
        "b1": "fused",
        "b2": "fused",
    }
    assert join(changed) == {"b1": "joined with b2", "b2": "joined with b1"}


@pytest.mark.usefixtures("library")
def test_what_does_not_fit_is_explained() -> None:
    layers = Layers(64, [48, 16])
    after, given = joined(layers.model()), layers.feeds(3, [4, 4], np.float16)
    with pytest.raises(Exception, match=r"BlockDiagPair: .*block_size_in is below.*D \(4, 10, 4\), K is 64, N2 16"):
        run(after, {**given, "D1": given["D1"][:, :10]}, True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_branch_within_the_weight_is_nearer_than_behind_the_layer(dtype: Any) -> None:
    """Prompts on CUDA: x · round(W + D) against round(round(x · round(W)) + x · D), on blocks a 200th of the weight."""
    random, shape = np.random.default_rng(0), BlockShape.for_linear(1024, 256, 16).blocks

    def rounded(values: Array) -> Array:
        return np.asarray(values.astype(dtype).astype(np.float64))

    stored = quantize(random.normal(0, 0.02, size=(256, 1024)).astype(np.float32), 4, 32, True)
    weight = dequantize(stored).astype(np.float64).T
    blocks, x = rounded(random.normal(0, 1e-4, shape)), rounded(random.normal(size=(64, 1024)))
    base = rounded(x @ rounded(weight))
    branch = apply(np.eye(1024), blocks, 256, np.zeros((1024, 256)))
    right = x @ (weight + branch)
    behind, within = rounded(base + x @ branch), rounded(x @ rounded(weight + branch))
    assert np.square(within - right).mean() < np.square(behind - right).mean()
    effect = x @ branch
    gain = float((effect * (within - base)).sum() / np.square(effect).sum())
    assert abs(gain - 1) < 0.05  # noise of twice the effect, over 16,384 outputs: 0.016


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_a_model_with_grouped_queries_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real export: q, k and v are one node before their biases, gate and up another, and its logits stay."""
    from diablo_export.converters.export import export
    from tests import tiny

    model = tiny.make_model("qwen2", tmp_path / "model")
    adapter = tiny.make_adapter(model, tmp_path / "adapter")
    folder = tmp_path / "int4"
    export(model, adapter, folder, quantize="int4", precision="fp16")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:  # level 4 rounds x to int8, and a last bit of it there to a 127th
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(graph, folder / "model.onnx")
    said = fuse_file(folder / "model.onnx", folder / "fused.onnx")
    assert len(said) == 14 and sum("joined with" in what for what in said.values()) == 10
    fused = onnx.load(folder / "fused.onnx", load_external_data=False).graph.node
    operators = [node.op_type for node in fused if node.domain == opschema.DOMAIN]
    assert operators == [opschema.NAMES_FUSED[n] for n in (3, 1, 2, 1)] * 2
    loaded = runtime.load_adapter(next((folder / "adapters").glob("*.onnx_adapter")))
    logits = {}
    for kernels in ("with", "off"):
        if kernels == "off":
            monkeypatch.setenv(runtime.LIBRARY_VARIABLE, kernels)
        for file in ("model.onnx", "fused.onnx"):
            opened = runtime.session(folder / file)
            logits[file, kernels] = [_logits(opened, one) for one in (None, loaded)]
    plain = logits["model.onnx", "off"]
    assert np.abs(plain[0] - plain[1]).max() > 0.1
    for key, got in logits.items():
        for one, wanted in zip(got, plain, strict=True):
            # Two layers in float16: some ten roundings of 2^-11 each
            assert np.abs(one - wanted).max() <= 0.01 * np.abs(wanted).max(), key


def _logits(opened: Any, adapter: Any) -> Array:
    given: dict[str, Any] = {}
    for value in opened.get_inputs():
        if value.name == "input_ids":
            given[value.name] = np.array([[5, 17, 254, 3, 90]], np.int64)
        elif value.name.startswith("past"):
            given[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
        elif value.name == "attention_mask":
            given[value.name] = np.ones((1, 5), np.int64)
    logits: Array = runtime.run(opened, given, adapter)[0].astype(np.float32)
    return logits
