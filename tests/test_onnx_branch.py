from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from diablo_export import opschema
from diablo_export.adapter import Adapter
from diablo_export.block_storage import to_int8
from diablo_export.blockdiag import Array, apply
from diablo_export.converters.onnx_branch import add_branches
from diablo_export.converters.onnx_match import match
from diablo_export.converters.onnx_merge import refuse
from diablo_export.errors import ExportError
from diablo_export.opschema import MODULE
from tests.onnx_runs import in_torch, runner, session
from tests.test_onnx_match import graph, module, weight

Get = Callable[..., Path]


def branched(file: Path, adapter: Adapter, folder: Path) -> Path:
    """The graph with branches, beside a copy of its data."""
    model = ir.load(file)
    add_branches(model, match(model, adapter.modules))
    for data in file.parent.glob("*.data"):
        shutil.copyfile(data, folder / data.name)  # onnxruntime refuses links of both kinds
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def blocks(adapter: Adapter) -> dict[str, Array]:
    return {opschema.input_name(name): one.blocks for name, one in adapter.modules.items()}


# llama: packed q, k, v straight into attention; qwen2: a bias behind them; qwen3: a Split behind them
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_fused_qkv_of_the_genai_builder(
    genai_graph: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path, architecture: str, precision: str
) -> None:
    original, adapter = genai_graph(architecture, precision), Adapter.load(tiny_adapter(architecture))
    file = branched(original, adapter, tmp_path)
    run = runner(file)
    base = runner(original)()
    assert np.array_equal(run(), base), "without blocks the graph must be the base bit for bit"
    tuned = run(more=blocks(adapter))
    if precision == "fp32":
        wanted = in_torch(tiny_model(architecture), tiny_adapter(architecture))
        np.testing.assert_allclose(tuned, wanted, rtol=0, atol=1e-4)  # logits near 10, two float32 layers
    assert np.abs(tuned - base).max() > 0.1
    nodes = onnx.load(file, load_external_data=False).graph.node
    assert sum(node.op_type == "BlockDiagMatMul" for node in nodes) == len(adapter.modules)
    splits = sum(node.op_type == "Split" for node in nodes)
    assert splits == 2, "one Split per layer: the builder's own where there is one, else ours"
    assert sum(node.op_type == "Concat" and "diablo" in node.name for node in nodes) == (
        0 if architecture == "qwen3" else 2
    )


def test_only_some_of_a_fused_node(genai_graph: Get, tiny_model: Get, other_adapter: Get, tmp_path: Path) -> None:
    adapter = Adapter.load(other_adapter("llama"))
    for name in [name for name in adapter.modules if not name.endswith(("k_proj", "down_proj"))]:
        del adapter.modules[name]
    run = runner(branched(genai_graph("llama", "fp32"), adapter, tmp_path))
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter.save(folder)
    wanted = in_torch(tiny_model("llama"), folder)
    np.testing.assert_allclose(run(more=blocks(adapter)), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [0, 4])
def test_parts_are_joined_for_one_branch(tmp_path: Path, bits: int) -> None:
    """A module of 96 outputs that the graph holds as 64 and 32: blocks cross the seam."""
    values = weight(96, 64, 0)
    model = graph({"/m/gate_proj/MatMul": values[:64], "/m/up_proj/MatMul": values[64:]}, bits)
    one = module("m.gate_up_proj", values)
    add_branches(model, match(model, {one.name: one}))
    ir.save(model, tmp_path / "model.onnx")
    opened = session(tmp_path / "model.onnx")
    assert [output.name for output in opened.get_outputs()] == ["/m/gate_proj/MatMul/out", "/m/up_proj/MatMul/out"]
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    base = np.concatenate(opened.run(None, {"x": x}), axis=1)
    tuned = np.concatenate(opened.run(None, {"x": x, "m.gate_up_proj.diablo_blocks": one.blocks}), axis=1)
    # 16 products of values near 1 in float32
    np.testing.assert_allclose(tuned, apply(x, one.blocks, 96, base), rtol=0, atol=2e-5)


def test_an_adapted_output_keeps_its_name_and_type(tmp_path: Path) -> None:
    values = weight(32, 64, 0)
    model = graph({"lm_head": values})
    one = module("lm_head", values)
    add_branches(model, match(model, {"lm_head": one}))
    ir.save(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [output.name for output in proto.graph.output] == ["lm_head/out"]
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    opened = session(tmp_path / "model.onnx")
    base = opened.run(None, {"x": x})[0]
    tuned = opened.run(None, {"x": x, "lm_head.diablo_blocks": one.blocks})[0]
    np.testing.assert_allclose(tuned, apply(x, one.blocks, 32, base), rtol=0, atol=2e-5)  # 16 products near 1


def test_structure(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    proto = onnx.load(branched(genai_graph("llama", "fp32"), adapter, tmp_path), load_external_data=False)
    assert [(f.domain, f.name) for f in proto.functions] == [("ai.diablo", "BlockDiagMatMul")]
    assert {entry.domain: entry.version for entry in proto.opset_import}["ai.diablo"] == 1
    inputs = {value.name: value for value in proto.graph.input}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    typed = {value.name: value for value in proto.graph.value_info}
    for node in (node for node in proto.graph.node if node.op_type == "BlockDiagMatMul"):
        name = node.metadata_props[0].value
        assert node.metadata_props[0].key == MODULE
        assert node.input[1] == f"{name}.diablo_blocks"
        sizes = inputs[node.input[1]].type.tensor_type.shape.dim
        assert [size.dim_param for size in sizes] == [
            f"{name}.{s}" for s in ("num_blocks", "block_size_in", "block_size_out")
        ]
        assert list(constants[node.input[1]].dims) == [0, 0, 0]
        assert typed[node.output[0]].type.tensor_type.shape.dim[-1].dim_value == adapter.modules[name].out_features
    assert len(inputs) > len(adapter.modules)


def test_a_graph_with_branches_gets_no_second_ones() -> None:
    values = weight(32, 64, 0)
    model = graph({"/m/a/MatMul": values})
    found = match(model, {"m.a": module("m.a", values)})
    add_branches(model, found)
    with pytest.raises(ExportError, match="holds DiaBlo branches already"):
        add_branches(model, found)


@pytest.mark.parametrize(("block_dtype", "second"), [(None, "/m/a/query/MatMul_1"), ("int8", "/m/a/query_1/MatMul")])
def test_a_module_that_runs_several_times_gets_its_branch_in_each(
    block_dtype: str | None, second: str, tmp_path: Path
) -> None:
    """ALBERT's one layer stands in the graph as often as it runs; its blocks are fed once."""
    values = weight(32, 64, 0)
    model = graph({"/m/a/query/MatMul": values, second: values, "/m/a/key/MatMul": weight(32, 64, 1)})
    one = module("m.a.query", values)
    found = match(model, {one.name: one})
    assert found[one.name].describe()["again"] == [second]
    with pytest.raises(ExportError, match=f"query: {second} is this module as well"):
        refuse(tmp_path, found.values())
    fed = dict.fromkeys(add_branches(model, found, block_dtype))
    ir.save(model, tmp_path / "model.onnx")
    opened = session(tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    base = opened.run(None, {"x": x})
    given = [one.blocks] if block_dtype is None else to_int8(one.blocks)
    tuned = opened.run(None, {"x": x, **dict(zip(fed, given, strict=True))})
    blocks_given = one.blocks if block_dtype is None else given[0] * given[1][:, None, None]
    for index in (0, 1):
        # 16 products of values near 1 in float32
        np.testing.assert_allclose(tuned[index], apply(x, blocks_given, 32, base[index]), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(tuned[2], base[2])


def test_a_graph_without_shapes_gets_them_with_its_branches() -> None:
    """torch's older exporter writes none, and onnxruntime then refuses what is reshaped behind a branch."""
    values = weight(32, 64, 0)
    model = graph({"/m/a/MatMul": values})
    product = next(node for node in model.graph if node.op_type == "MatMul")
    product.outputs[0].shape = None
    add_branches(model, match(model, {"m.a": module("m.a", values)}))
    branch = next(node for node in model.graph if node.op_type == opschema.NAME)
    assert branch.outputs[0].shape is not None and branch.outputs[0].shape[-1] == 32
