"""Tiny instances of every supported architecture, made on the spot with random weights: real models, not mocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # onnxruntime's GroupQueryAttention wants a multiple of 16 on CPU
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}

# name → (transformers config class, what differs from SIZES)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "head_dim": 64,  # a quarter of it turns, in steps of 16
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 128}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16, "sliding_window": 128}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,  # the last two read the keys of the first two
            "global_head_dim": 32,
            "sliding_window": 5,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 320,
        },
    ),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", {}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4}),
    "gemma": ("GemmaConfig", {}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "layer_types": ["attention", "attention"],
            "position_embedding_type": "rope",
            "residual_multiplier": 0.3,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "ernie": ("Ernie4_5Config", {}),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "phi": ("PhiConfig", {"num_attention_heads": 2, "head_dim": 32}),  # half of a head turns, in steps of 16
    "nemotron": ("NemotronConfig", {"num_attention_heads": 2, "head_dim": 32}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "bert": ("BertConfig", {}),
}

_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 4}
# mixtures of experts; `make_adapter` wants its targets named, as stored experts look like linear layers
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),  # stored one by one, gate and up apart
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "sliding_window": 5}),  # whole, turned, with biases
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),  # whole, by other names
    # and with other states than keys and values: of convolutions, of state spaces, of both in a layer with attention
    "lfm2-moe": (
        "Lfm2MoeConfig",
        {
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "granite-states": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "falcon-h1": ("FalconH1Config", {**_MAMBA, "mamba_d_ssm": 128, "mamba_d_head": 16}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": False},
    ),
}


BY_TORCH = ("bert", "gemma4", "gpt2", "gpt-neo", "gpt-neox")  # onnxruntime-genai's builder takes all the others


def make_model(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random model with its tokenizer; bert gets a two-class classification head."""
    import torch
    import transformers

    kind, differences = {**ARCHITECTURES, **MIXTURES}[architecture]
    computed = kind in ("GPT2Config", "GPTNeoConfig", "GPTNeoXConfig", "BertConfig")  # from the other sizes
    sizes = {key: value for key, value in SIZES.items() if not (computed and key == "head_dim")}
    config = getattr(transformers, kind)(**{**sizes, **differences, **changes})
    torch.manual_seed(seed)
    auto = (
        transformers.AutoModelForSequenceClassification if architecture == "bert" else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config, dtype=changes.get("dtype", torch.float32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # large enough that the logits differ from one token to the next
                parameter.normal_(0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer over a few sentences, with the special ids of SIZES."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    ).save_pretrained(folder)


def make_adapter(
    model: Path, folder: Path, num_blocks: int = 4, scale: float = 0.1, seed: int = 0, targets: tuple[str, ...] = ()
) -> Path:
    """Save an adapter with random blocks on every (or the named) linear layer of a model's blocks."""
    import numpy as np

    from diablo_export.adapter import AdaptedModule, Adapter, stored_transposed
    from diablo_export.blockdiag import BlockShape
    from diablo_export.checkpoint import Checkpoint
    from diablo_export.fingerprint import fingerprint

    checkpoint = Checkpoint.open(model)
    random = np.random.default_rng(seed)
    modules = {}
    for info in checkpoint:
        name = info.name.removesuffix(".weight")
        if (
            len(info.shape) != 2
            or not any(part in name for part in ("layer.", "layers.", ".h.", "h."))
            or name == info.name
        ):
            continue
        leaf = name.rpartition(".")[2]
        if targets and leaf not in targets:
            continue
        if min(info.shape) < num_blocks:
            continue
        weight = info.read().T if stored_transposed(checkpoint.config) else info.read()
        shape = BlockShape.for_linear(weight.shape[1], weight.shape[0], num_blocks)
        blocks = random.normal(0, scale, shape.blocks).astype(np.float32)
        modules[name] = AdaptedModule(name, blocks, weight.shape[1], weight.shape[0], fingerprint(weight))
    saved, labels, task = {}, [], "CAUSAL_LM"
    if "classifier.weight" in checkpoint.tensors:
        saved = {
            f"classifier.{part}": checkpoint.tensors[f"classifier.{part}"].read() * np.float32(1.5)
            for part in ("weight", "bias")
        }
        labels, task = ["negative", "positive"], "SEQ_CLS"
    adapter = Adapter(
        modules, task, str(model), num_blocks, sorted({n.rpartition(".")[2] for n in modules}), saved, labels
    )
    folder.mkdir(parents=True)
    adapter.save(folder)
    return folder


def make_other_adapter(model: Path, folder: Path) -> Path:
    """Save another adapter: 8 blocks, on the last layer only, with a head of its own."""
    import dataclasses

    from diablo_export.adapter import Adapter

    whole = Adapter.load(make_adapter(model, folder.with_name(f"{folder.name}-whole"), num_blocks=8, seed=1))
    last = {name: module for name, module in whole.modules.items() if ".1." in name}
    saved = {name: -value for name, value in whole.saved.items()}
    folder.mkdir(parents=True)
    dataclasses.replace(whole, modules=last, saved=saved).save(folder)
    return folder


def build_with_genai(model: Path, folder: Path, precision: str, *options: str) -> Path:
    """Run onnxruntime-genai's model builder as its users do, with its extra options; returns model.onnx."""
    import contextlib
    import io
    import logging

    from onnxruntime_genai.models import builder

    arguments = (None, str(model), str(folder), precision, "cpu", str(folder / "cache"))
    with contextlib.redirect_stdout(io.StringIO()):
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, list(options)))
    logging.getLogger().setLevel(logging.WARNING)
    return folder / "model.onnx"


def rewrite(model: Path, folder: Path, change: Callable[[str, Any], tuple[str, Any]], **config: Any) -> Path:
    """A copy of a model whose tensors went through `change`."""
    import json
    import shutil

    from safetensors.numpy import load_file

    from diablo_export.checkpoint import DTYPE_NAMES, SINGLE, write_safetensors

    shutil.copytree(model, folder)
    tensors = dict(change(name, value) for name, value in load_file(folder / SINGLE).items())
    layout = {name: (DTYPE_NAMES[value.dtype], value.shape) for name, value in tensors.items()}
    write_safetensors(folder / SINGLE, layout, tensors.items(), {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    return folder
