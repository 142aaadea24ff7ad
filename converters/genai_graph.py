"""The onnxruntime-genai road: its model builder lays out the graph on placeholders; the weights come later.

The builder gets a model whose matrices are meta tensors: they have a shape and an identity, and take no memory.
It transposes and slices them (views, which still know their storage), so each initializer it makes can be traced to
the parameter and the rows it came from. Vectors (norms, biases) are real: the builder computes with them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from diablo_export.checkpoint import decoder_class, text_settings
from diablo_export.converters.hf_skeleton import skeleton
from diablo_export.converters.onnx_nodes import Layout, Origin, Weights
from diablo_export.errors import ExportError, require

# Architectures whose graphs were compared with Hugging Face's own logits; the builder knows more, untried ones
ARCHITECTURES = (
    "Ernie4_5ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Lfm2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",  # its text model
    "SmolLM3ForCausalLM",
)
# rotary embeddings whose tables in the builder are Hugging Face's; for others (linear, dynamic, yarn) it makes
# different ones without a word
_ROPES = {
    "HunYuanDenseV1ForCausalLM": {"default", "dynamic"},
    "LlamaForCausalLM": {"default", "llama3"},
    "Phi3ForCausalLM": {"default", "longrope"},
}
# settings of config.json that the builder passes over in silence: what it takes them for
_TAKEN_FOR: dict[str, dict[str, Any]] = {
    "GraniteMoeHybridForCausalLM": {"num_local_experts": 0, "position_embedding_type": "rope"},
    "Lfm2ForCausalLM": {"conv_bias": False},
    "PhiForCausalLM": {"qk_layernorm": False},
}
_L2_EPSILON = 1e-6  # in transformers' code, not in config.json
_HEAD_SIZE_STEP = 16  # GroupQueryAttention on CPU refuses other head sizes, and only when it runs


def refusal(config: dict[str, Any], task: str = "causal-lm") -> str | None:
    """Why this road cannot take a model with this config.json; None where it can."""
    if task != "causal-lm":
        return f"onnxruntime-genai's builder makes decoders, and the task is {task}"
    if _architecture(config) not in ARCHITECTURES:
        return f"{_architecture(config)} is none of the {len(ARCHITECTURES)} taken to onnxruntime-genai's builder"
    config = text_settings(config)
    if head_size(config) % _HEAD_SIZE_STEP:
        return (
            f"the head size is {head_size(config)}; onnxruntime-genai's graphs use GroupQueryAttention, which needs a "
            f"multiple of {_HEAD_SIZE_STEP}"
        )
    for setting, taken in _TAKEN_FOR.get(_architecture(config), {}).items():
        if config.get(setting, False) != taken:
            said = json.dumps(config.get(setting))
            return f"config.json has {setting} {said}, which onnxruntime-genai's builder takes for {json.dumps(taken)}"
    strange = _rope_types(config) - _ROPES.get(_architecture(config), {"default"})
    if strange:
        return (
            f"its rotary embedding is of type {', '.join(sorted(strange))}, for which onnxruntime-genai's builder "
            "makes other tables than Hugging Face"
        )
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return 'onnxruntime-genai is not installed; pip install "diablo-export[genai]" for its faster graphs'
    return None


def reason(config: dict[str, Any], precision: str) -> str:
    """Why this road was taken, for the manifest."""
    said = f"onnxruntime-genai's builder has {_architecture(config)}, and its graphs are the fastest"
    return said if precision == "fp32" else f"{said}; fp16 is laid out for CUDA, which genai_config.json names"


def _architecture(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or ["a model whose config.json names no architecture"])[0])


def _rope_types(config: dict[str, Any]) -> set[str]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Gemma 3 has one set of parameters per kind of layer
    kinds = list(rope.values()) if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    return {str(kind.get("rope_type") or kind.get("type") or "default") for kind in kinds}


def head_size(config: dict[str, Any]) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def layout(weights: Weights, folder: Path, *, precision: str = "fp32", share_embeddings: bool = False) -> Layout:
    """Let the builder lay out the graph; writes genai_config.json and the tokenizer's files into `folder`.

    Args:
        weights: where the vectors come from.
        folder: the output folder.
        precision: fp32 or fp16.
        share_embeddings: one table for a tied embedding and head.

    Raises:
        ExportError: the builder refuses the model.
    """
    require("onnxruntime_genai", "genai")
    builder = require("onnxruntime_genai.models.builder", "genai")
    base: Any = builder.Model
    model, placeholders, tied = _placeholder_model(weights)
    made: dict[str, Any] = {}  # initializer name → the tensor it was made of
    finished: list[ir.Model] = []
    make_initializer = base.make_initializer

    def record(self: Any, tensor: Any, /, name: str, **how: Any) -> None:
        made[name] = tensor
        make_initializer(self, tensor, name, **how)

    patches = _mends(base, model) | {
        "load_weights": lambda self, path: model,
        "make_initializer": record,
        "save_model": lambda self, path: finished.append(self.model),
    }
    share = str(bool(tied) and share_embeddings).lower()
    options = ["fuse_qkv=false", "windowed_kv_cache=false", "hf_token=false", f"shared_embeddings={share}"]
    options += ["fuse_qk_norm_gqa=false", "exclude_mtp=true"]
    # the builder lays fp16 out for CUDA with the same GroupQueryAttention; its fp16 graphs for CPU fail when decoding
    provider = "cuda" if precision == "fp16" else "cpu"
    source, target = str(weights.checkpoint.folder), str(folder)
    with _patched(base, patches), _fast_linear(), _silent(), tempfile.TemporaryDirectory() as cache:
        try:
            parsed = builder.parse_extra_options(None, source, target, precision, provider, cache, options)
            _adjust(parsed["hf_details"]["hf_config"])
            builder.create_model(None, source, target, precision, provider, cache, **parsed)
        except Exception as error:  # the builder raises what it likes
            raise ExportError(
                f"{source}: onnxruntime-genai's builder refuses it: {type(error).__name__}: {error}"
            ) from error
    graph = finished[0]
    _keep_epsilon(graph.graph)
    graph.graph.sort()
    _name_cache_dims(graph, text_settings(weights.checkpoint.config))
    return Layout(graph, _origins(made, placeholders, graph), tied)


def _mends(base: Any, model: Any) -> dict[str, Callable[..., Any]]:
    """Methods of the builder in place of those that stray from Hugging Face."""
    make_model, make_rope = base.make_model, base.make_attention_qk_rope

    def make_exact(self: Any, path: str) -> None:
        root = math.sqrt(self.hidden_size)
        if self.embed_attrs["scale"] == round(root, 2):  # Gemma's, which the builder rounds to two decimals
            self.embed_attrs["scale"] = root
        make_model(self, path)

    def rope_where_wanted(self: Any, layer_id: int, **how: Any) -> tuple[str, str]:
        # the builder turns the layers of SmolLM3 that should not be turned by nodes of their own
        wanted = getattr(self, "no_rope_layers", None) or {layer_id: 1}
        return make_rope(self, layer_id, **how) if wanted[layer_id] else ("", "")

    def is_head(self: Any, module: Any) -> bool:
        # the builder takes every linear layer as wide as the vocabulary for the head
        return module is model.get_output_embeddings()

    return {"make_model": make_exact, "make_attention_qk_rope": rope_where_wanted, "has_lm_head": is_head}


def _adjust(config: Any) -> None:
    """Say in the builder's words what transformers 5 says in its own."""
    if config.architectures == ["Qwen3_5ForCausalLM"]:
        config.architectures = ["Qwen3_5ForConditionalGeneration"]
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:  # Gemma 3: one set of parameters per kind of layer
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_parameters = rope = dict(rope["full_attention"])
        config.rope_theta = rope["rope_theta"]
    text = config.get_text_config()
    if not hasattr(text, "rms_norm_eps"):  # the builder reads this name alone, else it takes 1e-6
        named = (getattr(text, name, None) for name in ("layer_norm_eps", "norm_eps"))
        text.rms_norm_eps = next(eps for eps in named if eps is not None)
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        # without this list the builder takes every layer of Mistral and Phi-3 for a full one, and says nothing
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    if rope.get("rope_type") == "longrope":
        config.rope_parameters = {**rope, "type": "longrope"}
    elif config.model_type == "phi3":
        # the builder takes any difference between these two for the long-context variant
        config.original_max_position_embeddings = config.max_position_embeddings


def _placeholder_model(weights: Weights) -> tuple[Any, dict[int, tuple[str, Any]], dict[str, str]]:
    """The Hugging Face model with meta matrices and real vectors, the matrices' names by storage, and what is tied.

    Tied parameters get a placeholder each, so that embedding and head can be told apart.
    """
    import torch

    checkpoint = weights.checkpoint
    model = skeleton(checkpoint.folder, decoder_class(checkpoint.config), dtype=torch.float32)
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    placeholders: dict[int, tuple[str, Any]] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
        if parameter.ndim >= 2:
            value = torch.empty(parameter.shape, device="meta")
        else:
            value = torch.from_numpy(weights.source(Origin(name)).read().astype("float32"))
        replaced = torch.nn.Parameter(value, requires_grad=False)
        model.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], replaced)
        if parameter.ndim >= 2:
            placeholders[_storage(replaced)] = (name, replaced)  # kept: an address must not be used twice
    return model.eval(), placeholders, tied


def _keep_epsilon(graph: ir.Graph) -> None:
    """Qwen3.5's keys and queries, x / √(Σx² + 1e-6): the builder leaves the epsilon out, which short vectors feel."""
    for node in [node for node in graph if node.op_type == "LpNormalization"]:
        x = node.inputs[0]  # (batch, tokens, heads, head size)
        assert x is not None and x.dtype is not None and x.shape is not None and isinstance(x.shape[-1], int)
        size = x.shape[-1]
        scale = ir.val(f"{node.name}/scale", const_value=ir.tensor(np.full(size, size**-0.5, x.dtype.numpy())))
        graph.register_initializer(scale)
        attributes = {"axis": -1, "epsilon": _L2_EPSILON / size, "stash_type": 1}
        norm = ir.node("SimplifiedLayerNormalization", [x, scale], attributes, name=node.name)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [norm], node.outputs, norm.outputs)


def _name_cache_dims(model: ir.Model, config: dict[str, Any]) -> None:
    """Give the caches their head size: the builder leaves it open for quantized caches, which are not used here."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None and len(value.shape) == 4 and str(value.shape[3]) == "kv_cache_dim":
            value.shape = ir.Shape([*value.shape[:3], head_size(config)])


def _origins(made: dict[str, Any], placeholders: dict[int, tuple[str, Any]], model: ir.Model) -> dict[str, Origin]:
    """Trace each initializer made of a meta tensor to its parameter.

    Raises:
        ExportError: the builder computed with a placeholder, so that its values cannot be had.
    """
    import torch

    origins: dict[str, Origin] = {}
    lost: list[str] = []
    for name, tensor in made.items():
        if name not in model.graph.initializers or not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
            continue
        parameter, whole = placeholders.get(_storage(tensor), (None, None))
        origin = None if parameter is None else _view(parameter, whole, tensor)
        if origin is None:
            lost.append(name)
        else:
            origins[name] = origin
    if lost:
        raise ExportError(
            f"onnxruntime-genai's builder computes {', '.join(lost[:5])} from the weights instead of storing them; "
            "this architecture must take the torch road"
        )
    return origins


def _view(parameter: str, whole: Any, view: Any) -> Origin | None:
    """What part of `whole` (out_features, in_features) a view of it is; None for a view of another kind."""
    if view.shape == whole.shape and view.stride() == whole.stride():  # of a convolution too: (channels, 1, taps)
        return Origin(parameter)
    width = whole.shape[-1]
    transposed = view.ndim == 2 and view.stride() == (1, width) and view.shape[0] == width
    plain = view.ndim == 2 and view.stride() == (width, 1) and view.shape[1] == width
    if not (transposed or plain) or view.storage_offset() % width:
        return None
    count = view.shape[1] if transposed else view.shape[0]
    start = view.storage_offset() // width
    rows = None if count == whole.shape[0] else (start, start + count)
    return Origin(parameter, transposed=transposed, rows=rows)


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def _patched(target: Any, replacements: dict[str, Any]) -> Iterator[None]:
    """Replace methods of a class for a while."""
    kept = {name: getattr(target, name) for name in replacements}
    try:
        for name, method in replacements.items():
            setattr(target, name, method)
        yield
    finally:
        for name, method in kept.items():
            setattr(target, name, method)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The builder prints its steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _fast_linear() -> Iterator[None]:
    """No random initial weights: the builder splits fused layers into new nn.Linear, then replaces their weights."""
    import torch

    with _patched(torch.nn.Linear, {"reset_parameters": lambda self: None}):
        yield
