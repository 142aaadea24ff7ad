from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import apply
from diablo_export.checkpoint import SINGLE
from diablo_export.converters import genai_graph
from diablo_export.converters.onnx_graph import Graph, build_graph
from diablo_export.quantization import dequantize, quantize
from tests import graphs, tiny

# float32 in another order of additions: a few 1e-6 on logits of about 5, through a handful of layers
CLOSE = 5e-5
ROPE_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [1 + 0.5 * i for i in range(8)],
}
# what a builder can get wrong without a word
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "layers as wide as the vocabulary": ("llama", {"intermediate_size": 320}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "scaled rotary": ("llama", {"rope_parameters": ROPE_3}),
    "window of Mistral": ("mistral", {"sliding_window": 5}),
    "window of Phi-3": ("phi3", {"sliding_window": 5}),
    "window of Gemma 2": ("gemma2", {"sliding_window": 5}),
    "both windows of Gemma 3": ("gemma3", {"sliding_window": 5, "num_hidden_layers": 7}),
    "window in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "embedding scale": ("gemma2", {"hidden_size": 80}),  # √80 is no round number
    "window of SmolLM3": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    ),
    "size of LFM2's layers": ("lfm2", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 32}),
    "scaled rotary of HunYuan": (
        "hunyuan",
        {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}},
    ),
    "biases of Granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "norms of Phi": ("phi", {"layer_norm_eps": 1e-2}),
    "norms of Nemotron": ("nemotron", {"norm_eps": 1e-2}),
    "norms of LFM2": ("lfm2", {"norm_eps": 1e-2}),
    "partial rotary": ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 32, "hidden_size": 128}),
    "long rotary": (
        "phi3",
        {"max_position_embeddings": 256, "original_max_position_embeddings": 32, "rope_parameters": LONG_ROPE},
    ),
}


def build(model: Path, folder: Path, **options: Any) -> Graph:
    folder.mkdir()
    graph = build_graph(model, folder, **options)
    assert graph.exporter == "genai", graph.reason
    return graph


def check_same(model: Path, folder: Path, network: Any = None) -> None:
    """Prefill, decoding on the cache, and a padded batch give Hugging Face's logits."""
    session = graphs.open_session(folder)
    wanted = graphs.logits_of(network or graphs.hugging_face(model), graphs.IDS)
    np.testing.assert_allclose(graphs.in_steps(session, graphs.IDS, 7), wanted, rtol=0, atol=CLOSE)
    got = graphs.padded(session, graphs.IDS, 9)
    np.testing.assert_allclose(got[0], wanted[0], rtol=0, atol=CLOSE)
    np.testing.assert_allclose(got[1, :9], wanted[1, :9], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", sorted(set(tiny.ARCHITECTURES) - set(tiny.BY_TORCH)))
def test_logits_are_hugging_faces(tiny_model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    build(tiny_model(name), tmp_path / "out")
    check_same(tiny_model(name), tmp_path / "out")


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_unusual_configs(tmp_path: Path, name: str) -> None:
    architecture, changes = VARIANTS[name]
    model = tiny.make_model(architecture, tmp_path / "model", **changes)
    build(model, tmp_path / "out")
    check_same(model, tmp_path / "out")


def test_real_model(real_data: Path, tmp_path: Path) -> None:
    model = real_data / "tinystories656k-hf"
    build(model, tmp_path / "out")
    check_same(model, tmp_path / "out")


def test_short_keys_of_linear_attention(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Keys of the size of the epsilon below their norm, which the builder leaves out."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_5"), model)
    tensors = load_file(model / SINGLE)
    tensors["model.layers.0.linear_attn.conv1d.weight"] *= 0.01
    save_file(tensors, model / SINGLE, {"format": "pt"})
    build(model, tmp_path / "out")
    check_same(model, tmp_path / "out")


@pytest.mark.parametrize("quantize_to", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama-tied", "phi3", "qwen3"])
def test_blocks_are_merged_on_the_way(
    tiny_model: Callable[[str], Path],
    tiny_adapter: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    quantize_to: str,
) -> None:
    """Also into fused modules, and before quantization: the reference is the tuned model with quantized weights."""
    import torch

    from diablo_export.trainer.layer import DiabloLinear
    from diablo_export.trainer.model import load_tuned

    adapter = Adapter.load(tiny_adapter(name))
    build(tiny_model(name), tmp_path / "out", merged=adapter, quantize=quantize_to, accuracy_level=1, group_size=16)
    network, _ = load_tuned(tiny_model(name), adapter)
    for module in network.modules():
        if isinstance(module, DiabloLinear):
            module.merge()
    if quantize_to != "none":
        bits = int(quantize_to.removeprefix("int"))
        for module in list(network.modules()):
            if isinstance(module, torch.nn.Linear):
                rounded = dequantize(quantize(module.weight.detach().numpy(), bits, 16))
                module.weight = torch.nn.Parameter(torch.from_numpy(rounded.copy()))
    check_same(tiny_model(name), tmp_path / "out", network)


def test_nodes_say_which_module_they_are(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    graph = build(tiny_model("llama"), tmp_path / "out", quantize="int4", symmetric=False)
    model = onnx.load(tmp_path / "out/model.onnx", load_external_data=False)
    marked = {p.value: node for node in model.graph.node for p in node.metadata_props if p.key == "diablo.module"}
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names = {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts} | {"lm_head"}
    assert set(marked) == set(graph.modules) == names
    sizes = {i.name: (list(i.dims), i.data_type) for i in model.graph.initializer}
    for name, entry in graph.modules.items():
        node = marked[name]
        assert (node.op_type, node.domain, node.name) == ("MatMulNBits", "com.microsoft", entry["node"])
        assert list(node.input[1:]) == [entry["weight"], entry["scales"], entry["zero_points"]]
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (4, 32, 4)
        out, groups, bytes_per_group = sizes[entry["weight"]][0]
        assert (attributes["N"], -(-attributes["K"] // 32), 16) == (out, groups, bytes_per_group)
        assert (entry["bits"], entry["group_size"], entry["symmetric"], entry["rows"]) == (4, 32, False, None)
    assert sizes["model.embed_tokens.weight"] == ([320, 64], onnx.TensorProto.FLOAT)  # embeddings stay float
    assert len((tmp_path / "out/model.onnx").read_bytes()) < 100_000


def test_a_split_module_lists_its_parts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    graph = build(tiny_model("phi3"), tmp_path / "out")
    parts = graph.modules["model.layers.1.self_attn.qkv_proj"]["parts"]
    assert [part["rows"] for part in parts] == [[0, 64], [64, 96], [96, 128]]
    assert [part["node"].split("/")[-2] for part in parts] == ["q_proj", "k_proj", "v_proj"]
    nodes = {node.name: node for node in ir.load(tmp_path / "out/model.onnx").graph}
    for part in parts:
        said = nodes[part["node"]].metadata_props
        assert said["diablo.module"] == "model.layers.1.self_attn.qkv_proj"
        assert said["diablo.rows"] == ":".join(map(str, part["rows"]))


def test_float_tied_head_is_stored_once_unless_it_has_blocks(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    model = tiny_model("llama-tied")
    build(model, tmp_path / "shared")
    blocks = np.random.default_rng(0).normal(0, 0.1, (4, 16, 80)).astype(np.float32)
    adapter = Adapter({"lm_head": AdaptedModule("lm_head", blocks, 64, 320)})
    build(model, tmp_path / "apart", merged=adapter)
    table = 320 * 64 * 4
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("shared", "apart")]
    assert sizes[1] - sizes[0] == table
    plain = graphs.in_steps(graphs.open_session(tmp_path / "shared"), graphs.IDS, 12)
    merged = graphs.in_steps(graphs.open_session(tmp_path / "apart"), graphs.IDS, 12)
    assert np.abs(merged - plain).max() > 0.1  # the head has changed, and only the head:
    network = graphs.hugging_face(model)
    hidden = network.model(input_ids=torch.from_numpy(graphs.IDS)).last_hidden_state.detach().numpy()
    wanted = apply(hidden, blocks, 320, graphs.logits_of(network, graphs.IDS))
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("quantize_to", ["none", "int8"])
def test_a_head_that_config_ties_and_the_checkpoint_stores_apart(
    quantize_to: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers keeps head and embeddings apart where both are stored and differ, whatever config.json says."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama-tied"), model)
    tensors = load_file(model / SINGLE)
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, model / SINGLE, {"format": "pt"})
    build(model, tmp_path / "out", quantize=quantize_to)
    wanted = graphs.logits_of(graphs.hugging_face(model), graphs.IDS)
    got = graphs.in_steps(graphs.open_session(tmp_path / "out"), graphs.IDS, 12)
    # int8 moves these logits by a fiftieth; the wrong head turns their sign
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE if quantize_to == "none" else 0.2)


def test_int4_weights_are_those_of_the_builder_itself(
    tiny_model: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime_genai.models import builder

    model, theirs = tiny_model("qwen3"), tmp_path / "theirs"
    build(model, tmp_path / "out", quantize="int4")
    assert capfd.readouterr().out == ""  # the builder's chatter is kept off standard output
    options = builder.parse_extra_options(
        None, str(model), str(theirs), "int4", "cpu", str(tmp_path / "c"), ["fuse_qkv=false", "shared_embeddings=false"]
    )
    builder.create_model(None, str(model), str(theirs), "int4", "cpu", str(tmp_path / "c"), **options)
    ours, reference = (ir.load(folder / "model.onnx").graph for folder in (tmp_path / "out", theirs))
    quantized = [name for name in reference.initializers if name.endswith(("_Q4", "_scales"))]
    assert len(quantized) == 2 * 15
    for name in quantized:
        np.testing.assert_array_equal(value(ours, name), value(reference, name), err_msg=name)
    assert {n.name for n in ours if n.op_type == "MatMulNBits"} == {
        n.name for n in reference if n.op_type == "MatMulNBits"
    }


def value(graph: ir.Graph, name: str) -> Any:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_16_bit_embedding_of_a_quantized_model_stays_16_bits(tmp_path: Path) -> None:
    import ml_dtypes
    import torch

    model = tiny.make_model("gemma2", tmp_path / "model", dtype=torch.bfloat16)
    build(model, tmp_path / "out", quantize="int8")
    graph = ir.load(tmp_path / "out/model.onnx").graph
    table = value(graph, "model.embed_tokens.weight")
    assert table.dtype == ml_dtypes.bfloat16
    stored = graphs.hugging_face(model).get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table.astype(np.float32), stored)


@pytest.mark.parametrize(
    ("name", "quantize_to"),
    [
        ("qwen2", "none"),
        ("qwen2", "int4"),
        ("granite", "none"),
        ("lfm2", "none"),
        ("phi", "none"),
        ("qwen3_5", "none"),
        ("smollm3", "none"),
    ],
)
def test_folder_runs_in_onnxruntime_genai(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str, quantize_to: str
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    import torch

    build(tiny_model(name), tmp_path / "out", quantize=quantize_to)
    prompt = graphs.IDS[:1, :6]
    model = og.Model(str(tmp_path / "out"))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=26, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    got = list(generator.get_sequence(0))
    if quantize_to == "none":
        wanted = graphs.hugging_face(tiny_model(name)).generate(
            torch.from_numpy(prompt), max_length=26, do_sample=False, pad_token_id=0
        )
        assert got == [token for token in wanted[0].tolist() if token != 2]  # an end is not told here
    else:
        assert len(got) > 6
    assert og.Tokenizer(model).encode("the cat").tolist()


def test_half_precision_is_laid_out_for_cuda_and_runs_on_the_cpu_too(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    graph = build(tiny_model("llama"), tmp_path / "out", precision="fp16")
    assert "CUDA" in graph.reason
    assert '"cuda"' in (tmp_path / "out/genai_config.json").read_text()
    session = graphs.open_session(tmp_path / "out")
    wanted = graphs.logits_of(graphs.hugging_face(tiny_model("llama")), graphs.IDS)
    got = graphs.in_steps(session, graphs.IDS, 7)
    # fp16 keeps 11 bits: 5e-4 of a logit of 5, times a few layers
    np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("config", "task", "why"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "causal-lm", "GPT2LMHeadModel is none of the"),
        ({}, "causal-lm", "names no architecture is none of the"),
        (
            {"architectures": ["Lfm2ForCausalLM"], "head_dim": 64, "conv_bias": True},
            "causal-lm",
            "has conv_bias true, which onnxruntime-genai's builder takes for false",
        ),
        (
            {"architectures": ["GraniteMoeHybridForCausalLM"], "head_dim": 64, "num_local_experts": 8},
            "causal-lm",
            "has num_local_experts 8, .* takes for 0",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "text-classification", "the task is text-classification"),
        (
            {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 8},
            "causal-lm",
            "the head size is 8; .* a multiple of 16",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "head_dim": 64, "rope_scaling": {"type": "linear", "factor": 2}},
            "causal-lm",
            "rotary embedding is of type linear",
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "head_dim": 64,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            "causal-lm",
            "rotary embedding is of type linear",
        ),
    ],
)
def test_what_this_road_refuses(config: dict[str, Any], task: str, why: str) -> None:
    assert re.search(why, genai_graph.refusal(config, task) or "")
