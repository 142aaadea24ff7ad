from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers

from diablo_export.converters.export import export
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.errors import ExportError
from tests import graphs, tiny
from tests.onnx_runs import LOGITS, in_torch, runner

# float32 in another order of additions: a few 1e-6 on logits of about 5, through a handful of layers
CLOSE = 5e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_one_node_of_a_layer(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    graph = build_graph(tiny_model(name), tmp_path)
    assert graph.exporter == "torch"
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    experts = [node for node in model.graph.node if node.op_type == "MoE"]
    marks = [entry.value for node in experts for entry in node.metadata_props if entry.key == "diablo.module"]
    assert marks == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    # no copies of weights for tokens: nothing in the graph is of three dimensions of experts but what the nodes read
    read = {value for node in experts for value in node.input}
    assert {each.name for each in model.graph.initializer if len(each.dims) == 3 and each.dims[0] == 4} <= read
    wanted = graphs.logits_of(graphs.hugging_face(tiny_model(name)), graphs.IDS)
    got = graphs.in_steps(graphs.open_session(tmp_path), graphs.IDS, 7)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE)


def test_blocks_beside_the_attention(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    adapter = tiny.make_adapter(model, tmp_path / "adapter", targets=("q_proj", "o_proj"))
    export(model, {"a": adapter}, tmp_path / "out")
    run = runner(tmp_path / "out" / "model.onnx")
    tuned = run(tmp_path / "out" / "adapters" / "a.onnx_adapter")
    np.testing.assert_allclose(tuned, in_torch(model, adapter), rtol=0, atol=LOGITS)
    assert np.abs(tuned - run()).max() > 1000 * LOGITS


def changed(kind: str, tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    model = tiny.make_model(kind, tmp_path / "model", **changes)
    (tmp_path / "out").mkdir()
    return model, tmp_path / "out"


def test_weights_that_do_not_sum_to_one(tmp_path: Path) -> None:
    """Qwen3-MoE without `norm_topk_prob`: the operator makes the sum of the weights of a token's experts one."""
    model, out = changed("qwen3-moe", tmp_path)
    build_graph(model, out)
    wanted = graphs.logits_of(graphs.hugging_face(model), graphs.IDS)
    np.testing.assert_allclose(graphs.in_steps(graphs.open_session(out), graphs.IDS, 7), wanted, rtol=0, atol=CLOSE)


def test_a_gate_that_the_operator_does_not_have(tmp_path: Path) -> None:
    model, out = changed("mixtral", tmp_path, hidden_act="gelu")
    with pytest.raises(ExportError, match=r"its experts' gate is none that onnxruntime's MoE operator has"):
        build_graph(model, out)


def test_the_graph_of_a_classifier_with_experts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_model("mixtral"))
    config.num_labels = 2
    network: Any = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    network.save_pretrained(tmp_path / "model")
    tiny.make_tokenizer(tmp_path / "model")
    (tmp_path / "out").mkdir()
    build_graph(tmp_path / "model", tmp_path / "out", task="text-classification")
    session = graphs.open_session(tmp_path / "out")
    found = session.run(None, {"input_ids": graphs.IDS, "attention_mask": np.ones_like(graphs.IDS)})[0]
    np.testing.assert_allclose(found, graphs.logits_of(network, graphs.IDS), rtol=0, atol=CLOSE)
