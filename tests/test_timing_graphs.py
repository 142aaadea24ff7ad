from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.converters.onnx_branch import add_branches
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_match import match
from diablo_export.errors import ExportError
from diablo_export.opschema import input_name
from diablo_export.timing.graphs import with_lora, without_branches
from tests import onnx_runs
from tests.test_onnx_branch import branched
from tests.test_onnx_match import graph, module, weight

Get = Callable[..., Path]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(f"{node.domain}::{node.op_type}" for node in model.graph.node)


def opened(model: bytes, folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("architecture", "quantize", "block_dtype"),
    [("llama", "int4", None), ("llama", "none", "int8"), ("gpt2", "none", None)],
)
def test_the_base_is_the_graph_before_the_branches(
    architecture: str, quantize: str, block_dtype: str | None, exported: Get, tiny_model: Get, tmp_path: Path
) -> None:
    out = exported(architecture, quantize, block_dtype=block_dtype)
    made = without_branches(out / "model.onnx")
    build_graph(tiny_model(architecture), tmp_path, quantize=quantize)
    before = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    after = onnx.load_from_string(made)
    assert operators(after) == operators(before)
    for of in ("input", "output"):
        assert [v.name for v in getattr(after.graph, of)] == [v.name for v in getattr(before.graph, of)]
    assert not after.functions and "ai.diablo" not in {each.domain for each in after.opset_import}
    session, whole = opened(made, out), onnx_runs.session(out / "model.onnx")
    feeds = {name: value for name, value in onnx_runs.feeds(session).items() if "diablo" not in name}
    # same graph, same kernels: the very same bits
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], whole.run(["logits"], feeds)[0])


def test_a_split_made_for_the_branches_goes_with_them(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """q, k and v in one node that nothing splits: export does, and joins them again."""
    given = genai_graph("llama", "fp32")
    file = branched(given, Adapter.load(tiny_adapter("llama")), tmp_path)
    assert operators(onnx.load(file, load_external_data=False))["::Split"] == 2
    made = onnx.load_from_string(without_branches(file))
    assert operators(made) == operators(onnx.load(given, load_external_data=False))
    blocks = {input_name(name): one.blocks for name, one in Adapter.load(tiny_adapter("llama")).modules.items()}
    _, values = with_lora(file, blocks)
    assert len(values) == 2 * len(blocks)  # the parts' widths are known


def test_parts_joined_for_a_branch_are_parts_again(tmp_path: Path) -> None:
    values = weight(96, 64, 0)
    model = graph({"/m/gate_proj/MatMul": values[:64], "/m/up_proj/MatMul": values[64:]}, 0)
    one = module("m.gate_up_proj", values)
    add_branches(model, match(model, {one.name: one}))
    ir.save(model, tmp_path / "model.onnx")
    session = opened(without_branches(tmp_path / "model.onnx"), tmp_path)
    assert [value.name for value in session.get_outputs()] == ["/m/gate_proj/MatMul/out", "/m/up_proj/MatMul/out"]
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    found = np.concatenate(session.run(None, {"x": x}), axis=1)
    np.testing.assert_allclose(found, x @ values.T, rtol=0, atol=2e-5)  # 64 products of values near 1 in float32
    kinds = operators(onnx.load_from_string(without_branches(tmp_path / "model.onnx")))
    assert kinds == {"::MatMul": 2}


def test_lora_adds_a_product_of_its_factors(exported: Get) -> None:
    out = exported("llama")
    blocks = runtime.load_adapter(out / "adapters" / "b.onnx_adapter").values()  # on the last layer only
    model, values = with_lora(out / "model.onnx", blocks)
    name = "model.layers.1.mlp.down_proj"
    # 8 blocks of 12 × 8 are 768 numbers: a rank of 5 has (96 + 64) · 5 = 800, one of 4 has 640
    assert values[f"{name}.lora_A"].shape == (96, 5) and values[f"{name}.lora_B"].shape == (5, 64)
    assert not any(".layers.0." in each for each in values)
    session = opened(model, out)
    feeds = onnx_runs.feeds(session)
    feeds = {key: value for key, value in feeds.items() if "lora" not in key}
    base = session.run(["logits"], feeds)[0]
    plain = opened(without_branches(out / "model.onnx"), out)
    np.testing.assert_array_equal(base, plain.run(["logits"], onnx_runs.feeds(plain))[0])  # rank 0 adds nothing
    assert np.abs(session.run(["logits"], {**feeds, **values})[0] - base).max() > 1e-4


def test_lora_is_the_product_in_the_weights(exported: Get) -> None:
    out = exported("llama")
    blocks = runtime.load_adapter(out / "adapters" / "a.onnx_adapter").values()
    name = "model.layers.0.self_attn.o_proj"
    model, values = with_lora(out / "model.onnx", blocks)
    one = {key: value for key, value in values.items() if key.startswith(f"{name}.")}
    session = opened(model, out)
    feeds = {key: value for key, value in onnx_runs.feeds(session).items() if "lora" not in key}
    found = session.run(["logits"], {**feeds, **one})[0]
    graph = onnx.load_from_string(without_branches(out / "model.onnx"))
    onnx.load_external_data_for_model(graph, str(out))
    (node,) = [each for each in graph.graph.node if each.op_type == "MatMul" and "layers.0/attn/o_proj" in each.name]
    (weight,) = [each for each in graph.graph.initializer if each.name == node.input[1]]
    delta = one[f"{name}.lora_A"] @ one[f"{name}.lora_B"]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + delta, weight.name))
    merged = opened(graph.SerializeToString(), out)
    # float32 logits of magnitude 10, summed in another order
    np.testing.assert_allclose(found, merged.run(["logits"], feeds)[0], atol=onnx_runs.LOGITS)


def test_lora_needs_to_know_how_wide_a_branch_is(exported: Get, tmp_path: Path) -> None:
    model = onnx.load(exported("llama") / "model.onnx", load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"does not say how wide the input and the output of model\.layers"):
        with_lora(tmp_path / "model.onnx", {})
