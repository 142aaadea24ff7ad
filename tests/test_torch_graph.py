from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint, read_header, write_safetensors
from diablo_export.converters import torch_graph
from diablo_export.converters.onnx_graph import Graph, build_graph
from diablo_export.converters.onnx_names import SCOPES
from diablo_export.converters.onnx_nodes import Layout, Weights, finish
from diablo_export.errors import ExportError
from diablo_export.quantization import dequantize, quantize
from diablo_export.trainer.layer import DiabloLinear
from diablo_export.trainer.model import load_base, load_tuned
from tests import graphs, tiny

# float32 in another order of additions: a few 1e-6 on logits of about 5, through a handful of layers
CLOSE = 5e-5


@pytest.fixture(scope="session")
def gpt2(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    folder = tmp_path_factory.mktemp("gpt2") / "out"
    folder.mkdir()
    return build_graph(tiny_model("gpt2"), folder), folder


@pytest.fixture(scope="session")
def bert(
    tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Graph, Path]:
    """A merged classifier: blocks and head from the adapter."""
    folder = tmp_path_factory.mktemp("bert") / "out"
    folder.mkdir()
    merged = Adapter.load(tiny_adapter("bert"))
    return build_graph(tiny_model("bert"), folder, task="text-classification", merged=merged), folder


def classifier_inputs(batch: int, length: int) -> dict[str, Array]:
    """Rows of falling length, padded on the right, in two segments."""
    ids = np.random.default_rng(1).integers(3, 300, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, length - 2 * row :] = row == 0
    types = np.zeros_like(ids)
    types[:, length // 2 :] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def classify(network: Any, inputs: dict[str, Array]) -> Array:
    with torch.no_grad():
        logits: Array = network(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    return logits


def test_gpt2_gives_hugging_faces_logits(gpt2: tuple[Graph, Path], tiny_model: Callable[[str], Path]) -> None:
    session = graphs.open_session(gpt2[1])
    network = graphs.hugging_face(tiny_model("gpt2"))
    wanted = graphs.logits_of(network, graphs.IDS)
    # a prefill on an empty cache, then single tokens
    np.testing.assert_allclose(graphs.in_steps(session, graphs.IDS, 7), wanted, rtol=0, atol=CLOSE)
    # a chunk of several tokens on a cache
    first = graphs.run(session, graphs.IDS[:, :5], np.ones((2, 5), np.int64))
    past = {name.replace("present.", "past_key_values."): value for name, value in first.items()}
    chunk = graphs.run(session, graphs.IDS[:, 5:], np.ones_like(graphs.IDS), past)["logits"]
    np.testing.assert_allclose(chunk, wanted[:, 5:], rtol=0, atol=CLOSE)
    # one row, one token: sizes of 1 were not taken for fixed
    single = graphs.run(session, graphs.IDS[:1, :1], np.ones((1, 1), np.int64))["logits"]
    np.testing.assert_allclose(single, wanted[:1, :1], rtol=0, atol=CLOSE)


def test_padding_on_the_left_is_masked(gpt2: tuple[Graph, Path], tiny_model: Callable[[str], Path]) -> None:
    mask = np.ones_like(graphs.IDS)
    mask[1, :4] = 0
    got = graphs.run(graphs.open_session(gpt2[1]), graphs.IDS, mask)["logits"][1, 4:]
    wanted = graphs.logits_of(graphs.hugging_face(tiny_model("gpt2")), graphs.IDS[1:, 4:])[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE)


def test_gpt2_inputs_outputs_and_nodes(gpt2: tuple[Graph, Path]) -> None:
    graph, folder = gpt2
    session = graphs.open_session(folder)
    kinds = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{k}" for k in kinds)]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 4, "past_sequence_length", 16]
    assert [entry.name for entry in session.get_outputs()] == ["logits", *(f"present.{kind}" for kind in kinds)]
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = {f"transformer.h.{layer}.{part}" for layer in range(2) for part in parts} | {"lm_head"}
    assert set(graph.modules) == names
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    for name, entry in graph.modules.items():
        node = nodes[entry["node"]]
        said = {p.key: p.value for p in node.metadata_props}
        assert (node.op_type, node.input[1]) == ("MatMul", entry["weight"]) and entry["transposed"]
        assert said["diablo.module"] == name
        assert f"'{name}'" in said[SCOPES]
    assert graph.exporter == "torch" and "GPT2LMHeadModel" in graph.reason
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.onnx.data"}
    assert str(Path(torch.__file__).parent) not in str(model)  # no stack traces of the machine that exported


def test_shared_table_is_stored_once(gpt2: tuple[Graph, Path]) -> None:
    model = onnx.load(gpt2[1] / "model.onnx", load_external_data=False)
    assert sum(list(i.dims) in ([320, 64], [64, 320]) for i in model.graph.initializer) == 1


def test_classifier_has_the_adapters_blocks_and_head(
    bert: tuple[Graph, Path], tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path]
) -> None:
    graph, folder = bert
    tuned, _ = load_tuned(tiny_model("bert"), Adapter.load(tiny_adapter("bert")))
    base, _ = load_base(tiny_model("bert"), "text-classification")
    session = graphs.open_session(folder)
    assert [entry.name for entry in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    for batch, length in ((3, 9), (1, 1), (2, 30)):
        inputs = classifier_inputs(batch, length)
        wanted = classify(tuned, inputs)
        np.testing.assert_allclose(session.run(None, inputs)[0], wanted, rtol=0, atol=CLOSE)
        assert np.abs(wanted - classify(base, inputs)).max() > 100 * CLOSE  # the adapter does something
    assert "bert.encoder.layer.1.intermediate.dense" in graph.modules
    assert "text-classification" in graph.reason
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "negative", "1": "positive"}


@pytest.mark.slow
@pytest.mark.parametrize("quantize_to", ["int8", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_quantized_graphs_of_tuned_models(
    tiny_model: Callable[[str], Path],
    tiny_adapter: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    quantize_to: str,
) -> None:
    """The reference is the tuned model with each linear weight rounded to the same grid."""
    from transformers.pytorch_utils import Conv1D

    adapter = Adapter.load(tiny_adapter(name))
    task = "text-classification" if name == "bert" else "causal-lm"
    graph = build_graph(tiny_model(name), tmp_path, task=task, merged=adapter, quantize=quantize_to, accuracy_level=1)
    assert {entry["layout"] for entry in graph.modules.values()} == {"MatMulNBits"}
    network, _ = load_tuned(tiny_model(name), adapter)
    for module in network.modules():
        if isinstance(module, DiabloLinear):
            module.merge()
    for module in list(network.modules()):
        if isinstance(module, torch.nn.Linear | Conv1D):
            weight = module.weight.detach().numpy()
            oriented = weight.T if isinstance(module, Conv1D) else weight
            rounded = dequantize(quantize(np.ascontiguousarray(oriented), int(quantize_to.removeprefix("int"))))
            module.weight = torch.nn.Parameter(
                torch.from_numpy((rounded.T if isinstance(module, Conv1D) else rounded).copy())
            )
    session = graphs.open_session(tmp_path)
    if name == "bert":
        inputs = classifier_inputs(3, 9)
        np.testing.assert_allclose(session.run(None, inputs)[0], classify(network, inputs), rtol=0, atol=CLOSE)
    else:
        wanted = graphs.logits_of(network, graphs.IDS)
        np.testing.assert_allclose(graphs.in_steps(session, graphs.IDS, 7), wanted, rtol=0, atol=CLOSE)


@pytest.mark.slow
def test_weights_of_a_layer_that_runs_twice_stay_float(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    sizes = {name: tiny.SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.AlbertConfig(**sizes, embedding_size=32, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.AlbertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    model.save_pretrained(tmp_path / "base")
    tiny.make_tokenizer(tmp_path / "base")
    (tmp_path / "out").mkdir()
    build_graph(tmp_path / "base", tmp_path / "out", task="text-classification", quantize="int8", accuracy_level=1)
    (said,) = [record.getMessage() for record in caplog.records if "not quantized" in record.getMessage()]
    assert "albert_layers.0.attention.query" in said and "classifier" not in said
    inputs = classifier_inputs(2, 9)
    found = graphs.open_session(tmp_path / "out").run(None, inputs)[0]
    # the classifier and the embedding's projection are in int8: 1/254 of each group's largest weight
    np.testing.assert_allclose(found, classify(model, inputs), rtol=0, atol=0.01)


@pytest.mark.slow
def test_real_model_whose_heads_are_of_size_8(real_data: Path, tmp_path: Path) -> None:
    model = real_data / "stories260k-hf"
    graph = build_graph(model, tmp_path)
    assert graph.exporter == "torch" and "the head size is 8" in graph.reason
    wanted = graphs.logits_of(graphs.hugging_face(model), graphs.IDS)
    # logits of about 20 here: 1e-4 is 5e-6 of that
    np.testing.assert_allclose(graphs.in_steps(graphs.open_session(tmp_path), graphs.IDS, 7), wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_rotary_embeddings_that_the_other_road_gets_wrong(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = tiny.make_model("llama", tmp_path / "model", rope_parameters={"rope_theta": 1e4, **rope})
    (tmp_path / "out").mkdir()
    graph = build_graph(model, tmp_path / "out")
    assert graph.exporter == "torch" and rope["rope_type"] in graph.reason
    wanted = graphs.logits_of(graphs.hugging_face(model), graphs.IDS)
    got = graphs.in_steps(graphs.open_session(tmp_path / "out"), graphs.IDS, 7)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE)


def test_layers_that_read_the_keys_of_others(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    build_graph(tiny_model("gemma4"), tmp_path)
    session = graphs.open_session(tmp_path)
    caches = {value.name: value.shape[3] for value in session.get_inputs() if value.name.startswith("past")}
    kinds = [("0.key", 16), ("0.value", 16), ("1.key", 32), ("1.value", 32)]
    assert caches == {f"past_key_values.{kind}": size for kind, size in kinds}
    wanted = graphs.logits_of(graphs.hugging_face(tiny_model("gemma4")), graphs.IDS)
    np.testing.assert_allclose(graphs.in_steps(session, graphs.IDS, 7), wanted, rtol=0, atol=CLOSE)


@pytest.mark.slow
def test_half_precision(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    build_graph(tiny_model("gpt2"), tmp_path, precision="fp16")
    wanted = graphs.logits_of(graphs.hugging_face(tiny_model("gpt2")), graphs.IDS)
    got = graphs.in_steps(graphs.open_session(tmp_path), graphs.IDS, 7).astype(np.float32)
    # fp16 keeps 11 bits: 5e-4 of a logit of 5, times a few layers
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("stored", [True, False])
def test_buffers_are_the_checkpoint_s_where_it_holds_them(
    stored: bool, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4 saves a scale for each layer as a buffer, which is 1 until a checkpoint says otherwise."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    module = Scaled().to("meta")
    program = torch_graph._export(module, (torch.empty(2, 3, device="meta"),), ({0: "rows"},), ["x"], ["y"])
    graph = torch_graph._simplified(program, {"scale"}, {})
    traced = Layout(graph, torch_graph._origins(graph.graph, module, {"scale"}))
    monkeypatch.setattr(torch_graph, "_trace", lambda *_: (traced, {"scale": np.ones(3, np.float32)}))
    monkeypatch.setattr(torch_graph, "_TRACED", {})
    file = tmp_path / "scale.safetensors"
    write_safetensors(file, {"scale": ("F32", (3,))}, [("scale", np.full(3, 0.5, np.float32))])
    checkpoint = Checkpoint.open(tiny_model("llama"))
    if stored:
        checkpoint = replace(checkpoint, tensors=checkpoint.tensors | read_header(file)[0])
    weights = Weights(checkpoint)
    finish(torch_graph.layout(weights, tmp_path, task="causal-lm"), weights, tmp_path)
    found = graphs.open_session(tmp_path).run(None, {"x": np.ones((2, 3), np.float32)})[0]
    np.testing.assert_array_equal(found, np.full((2, 3), 0.5 if stored else 1))


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer(tmp_path / "model")
    with pytest.raises(ExportError, match=r"no cache of keys and values. merge --format hf can take it; or export it"):
        build_graph(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("layout", [{"num_kv_heads": 2, "new_decoder_architecture": True}, {"multi_query": True}])
def test_falcon_whose_keys_are_taken_by_lists_of_indices(layout: dict[str, Any], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    network = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **layout)).eval()
    network.save_pretrained(tmp_path / "base")
    tiny.make_tokenizer(tmp_path / "base")
    (tmp_path / "out").mkdir()
    build_graph(tmp_path / "base", tmp_path / "out")
    ids = np.array([[5, 6, 7, 8]])
    found = graphs.in_steps(graphs.open_session(tmp_path / "out"), ids, 2)
    expected = graphs.logits_of(network, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # float32 sums in another order
