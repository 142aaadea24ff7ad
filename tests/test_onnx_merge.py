from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from diablo_export.adapter import AdaptedModule, Adapter, file_sha256
from diablo_export.blockdiag import Array, BlockShape, add_to_weight
from diablo_export.converters import onnx_groups
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_linears import Linear, linears, numpy_of
from diablo_export.converters.onnx_match import match
from diablo_export.converters.onnx_merge import onnx_merge
from diablo_export.errors import AdapterError, ExportError, InputError, MatchError
from diablo_export.fingerprint import fingerprint
from diablo_export.manifest import file_xxh3
from diablo_export.quantization import Quantized, dequantize, quantize, unpack, zero_points
from tests.onnx_runs import LOGITS, in_torch, runner
from tests.test_onnx_match import graph, module, weight

Get = Callable[..., Path]


def grid(layer: Linear) -> Quantized:
    """A node's weight as the codec knows it."""
    assert layer.scales is not None
    groups = -(-layer.in_features // layer.group_size)
    return Quantized(
        np.array(numpy_of(layer.weight)).reshape(layer.out_features, groups, -1),
        np.array(numpy_of(layer.scales)).reshape(layer.out_features, groups),
        None if layer.zero_points is None else np.array(numpy_of(layer.zero_points)).reshape(layer.out_features, -1),
        layer.bits, layer.group_size, layer.in_features,
    )  # fmt: skip


def touched(shape: BlockShape, size: int) -> Array:
    """Which groups (out_features, groups) some block meets."""
    groups = np.zeros((shape.out_features, -(-shape.in_features // size)), bool)
    for inputs, outputs in shape.slices():
        groups[outputs, inputs.start // size : -(-inputs.stop // size)] = True
    return groups


def check(before: Quantized, after: Quantized, one: AdaptedModule) -> None:
    """Untouched groups are the same; touched ones are the sum, rounded as the codec rounds the whole weight."""
    met = touched(one.shape, before.group_size)
    wanted = quantize(
        add_to_weight(dequantize(before), one.blocks), before.bits, before.group_size, before.zero_points is None
    )
    assert 0 < met.mean() < 1
    for old, new, fresh in (
        (before.codes, after.codes, wanted.codes),
        (before.scales, after.scales, wanted.scales),
        (zero_points(before), zero_points(after), zero_points(wanted)),
    ):
        assert np.array_equal(new[~met], old[~met])
        assert np.array_equal(new[met], fresh[met])
    assert not np.array_equal(before.codes, after.codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("num_blocks", [3, 4])  # 4: on whole groups; 3: blocks end inside a group
def test_quantized_weights_change_in_touched_groups_only(tmp_path: Path, bits: int, num_blocks: int) -> None:
    values = weight(24, 88, 0)  # 88 inputs: five groups of 16 and a half
    blocks = np.random.default_rng(1).normal(size=BlockShape.for_linear(88, 24, num_blocks).blocks)
    one = AdaptedModule("m.a", blocks.astype(np.float32), 88, 24, fingerprint(values))
    ir.save(graph({"/m/a/MatMul": values}, bits), tmp_path / "model.onnx")
    before = grid(linears(ir.load(tmp_path / "model.onnx"))[0])
    (entry,) = onnx_merge(tmp_path / "model.onnx", Adapter({"m.a": one}))
    after = grid(linears(ir.load(tmp_path / "model.onnx"))[0])
    check(before, after, one)
    met = touched(one.shape, 16)
    assert entry["action"] == "merged"
    assert entry["why"].startswith(f"requantized {met.sum()} of {met.size} groups, all that a block meets")
    assert before.zero_points is not None and after.zero_points is not None
    assert unpack(after.codes, bits, 16)[:, -1, 8:].max() == 0, "codes past the last input stay blank"


def test_rows_at_once_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that meet two and three groups, all rows together or one after the other: the same bytes."""
    values = weight(24, 88, 0)
    blocks = np.random.default_rng(1).normal(size=BlockShape.for_linear(88, 24, 3).blocks).astype(np.float32)
    one = AdaptedModule("m.a", blocks, 88, 24, fingerprint(values))
    written = []
    for most in (onnx_groups._AT_ONCE, 1):
        monkeypatch.setattr(onnx_groups, "_AT_ONCE", most)
        ir.save(graph({"/m/a/MatMul": values}, 4), tmp_path / "model.onnx")
        onnx_merge(tmp_path / "model.onnx", Adapter({"m.a": one}))
        written.append((tmp_path / "model.onnx").read_bytes())
    assert written[0] == written[1]


def test_the_genai_builders_int4(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    given = genai_graph("llama", "int4")
    before_hash = file_sha256(given.with_suffix(".onnx.data"))
    manifest = merge(given.parent, tiny_adapter("llama"), tmp_path / "out", method="rtn")
    assert (manifest["exporter"], manifest["quantize"], manifest["format"]) == ("given", "int4", "onnx")
    assert (
        manifest["files"]["model.onnx.data"]["sha256"] == file_sha256(tmp_path / "out/model.onnx.data") != before_hash
    )
    assert file_sha256(given.with_suffix(".onnx.data")) == before_hash
    assert file_xxh3(given) == manifest["base"]["files"]["model.onnx"]
    adapter = Adapter.load(tiny_adapter("llama"))
    model = ir.load(given)
    after = {layer.name: layer for layer in linears(ir.load(tmp_path / "out/model.onnx"))}
    for name, one in match(model, adapter.modules).items():
        (piece,) = one.pieces
        rows = slice(piece.start, piece.stop)  # q, k and v share a node
        parts = [
            Quantized(g.codes[rows], g.scales[rows], None, g.bits, g.group_size, g.in_features)
            for g in (grid(piece.linear), grid(after[piece.linear.name]))
        ]
        check(parts[0], parts[1], adapter.modules[name])
    assert np.array_equal(numpy_of(after["/lm_head/MatMul_Q4"].weight), numpy_of(linears(model)[-1].weight))
    effect = runner(tmp_path / "out/model.onnx")() - runner(given)()
    wanted = in_torch(_tiny(tiny_adapter), tiny_adapter("llama")) - in_torch(_tiny(tiny_adapter))
    cosine = float((effect * wanted).sum() / np.linalg.norm(effect) / np.linalg.norm(wanted))
    assert cosine > 0.8  # int4 of random weights is coarse; without the adapter this is 0


def _tiny(tiny_adapter: Get) -> Path:
    return Path(Adapter.load(tiny_adapter("llama")).base_model or "")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_genai_builders_float(
    architecture: str, genai_graph: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    manifest = merge(genai_graph(architecture, "fp32").parent, tiny_adapter(architecture), tmp_path / "out")
    assert manifest["quantize"] == "none"
    wanted = in_torch(tiny_model(architecture), tiny_adapter(architecture))
    np.testing.assert_allclose(runner(tmp_path / "out/model.onnx")(), wanted, rtol=0, atol=LOGITS)


def half(values: Array, file: Path) -> Path:
    """A graph of one layer that is stored in float16."""
    model = graph({"/m/a/MatMul": values})
    (weight,) = model.graph.initializers.values()
    weight.const_value = ir.tensor(values.T.astype(np.float16), name=weight.name)
    weight.dtype = ir.DataType.FLOAT16
    ir.save(model, file)
    return file


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    values = weight(24, 88, 0)
    blocks = np.zeros(BlockShape.for_linear(88, 24, 4).blocks, np.float32)
    blocks[3, -1, -1] = 70_000
    file = half(values, tmp_path / "model.onnx")
    before = file.read_bytes()
    adapter = Adapter({"m.a": AdaptedModule("m.a", blocks, 88, 24, fingerprint(values))})
    with pytest.raises(AdapterError, match=r"m\.a: base plus blocks overflows float16.*/m/a/MatMul"):
        onnx_merge(file, adapter)
    assert file.read_bytes() == before


def test_what_float16_takes_away_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.ones((24, 88), np.float32)  # the next float16 is 0.001 away
    blocks = np.full(BlockShape.for_linear(88, 24, 4).blocks, 1e-4, np.float32)
    adapter = Adapter({"m.a": AdaptedModule("m.a", blocks, 88, 24)})
    with caplog.at_level("WARNING", "diablo_export"):
        (entry,) = onnx_merge(half(values, tmp_path / "model.onnx"), adapter)
    assert entry["weight_gain"] == 0
    assert "m.a keeps 0%" in caplog.text and "float32" in caplog.text


def test_a_module_in_parts(tmp_path: Path) -> None:
    values = weight(96, 64, 0)
    ir.save(graph({"/m/gate_proj/MatMul": values[:64], "/m/up_proj/MatMul": values[64:]}), tmp_path / "model.onnx")
    one = module("m.gate_up_proj", values)
    (entry,) = onnx_merge(tmp_path / "model.onnx", Adapter({one.name: one}))
    assert [part["rows"] for part in entry["parts"]] == [[0, 64], [64, 96]]
    after = np.concatenate([numpy_of(layer.weight).T for layer in linears(ir.load(tmp_path / "model.onnx"))])
    assert np.array_equal(after, add_to_weight(values, one.blocks))


def test_the_wrong_base(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(MatchError, match="8 of the 8 adapted modules"):
        merge(genai_graph("llama", "int4").parent, tiny_adapter("gpt2"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_merging_twice_is_refused(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    merge(genai_graph("llama", "int4").parent, tiny_adapter("llama"), tmp_path / "out", method="rtn")
    with pytest.raises(InputError, match="was made by diablo-export merge with the adapter adapter; give the base"):
        merge(tmp_path / "out", tiny_adapter("llama"), tmp_path / "twice")
    (tmp_path / "out/diablo_export.json").unlink()
    shutil.rmtree(tmp_path / "twice", ignore_errors=True)


def test_a_shared_weight_is_refused(tmp_path: Path) -> None:
    values = weight(32, 64, 0)
    model = graph({"/m/a/MatMul": values})
    first = next(iter(model.graph))
    second = ir.Node("", "MatMul", [first.inputs[0], first.inputs[1]], name="tied")
    second.outputs[0].name, second.outputs[0].type = "tied/out", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"/m/a/MatMul: its weight is shared with tied, which would change as well"):
        onnx_merge(tmp_path / "model.onnx", Adapter({"m.a": module("m.a", values)}))


def test_permuted_groups_are_refused(tmp_path: Path) -> None:
    values = weight(32, 64, 0)
    model = graph({"/m/a/MatMul": values}, 4)
    node = next(iter(model.graph))
    tensor = ir.tensor(np.arange(64, dtype=np.int32) // 16, name="g_idx")
    order = ir.Value(name="g_idx", shape=ir.Shape([64]), type=ir.TensorType(ir.DataType.INT32), const_value=tensor)
    model.graph.register_initializer(order)
    node.resize_inputs(5)
    node.replace_input_with(4, order)
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"/m/a/MatMul: its groups are permuted \(g_idx\)"):
        onnx_merge(tmp_path / "model.onnx", Adapter({"m.a": module("m.a", values)}))
