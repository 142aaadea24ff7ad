"""Which models of transformers go the whole road: python examples/benchmarks/architectures.py [TYPE …]

Each `model_type` is made on the spot with random weights in a few layers, trained for three steps, merged into Hugging
Face weights and exported as a float branch. The reference is torch with the blocks added to its weights here, by other
code than the package's. Figures are the largest difference of logits, as a share of what the blocks change at most:
of the merge and of the export, over a prompt at once and, for decoders, through its cache in steps of one token, past
the sliding window where there is one. All of them: some twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.console import log
from diablo_export.converters.demo_model import make_tokenizer
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.errors import DiabloError
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.trainer.train import train

SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 258, "sliding_window": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
FOUR = {"num_hidden_layers": 4}
PATTERN = {**FOUR, "sliding_window_pattern": 2}
SHARED = {  # the last two layers read the keys of the first two
    **FOUR, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 1024,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
DECODERS: dict[str, dict[str, Any]] = {
    "apertus": {}, "arcee": {}, "biogpt": {}, "bitnet": {}, "bloom": {"n_layer": 2},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {}, "cohere2": PATTERN, "ctrl": {**GPT, "dff": 96}, "diffllama": {}, "doge": {}, "ernie4_5": {},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4}, "exaone_moe": MOE, "flex_olmo": MOE, "cohere2_moe": MOE,
    "glm4_moe": {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "exaone4": PATTERN, "falcon": {}, "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma": {}, "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {**PATTERN, "query_pre_attn_scalar": 16}, "glm": {}, "glm4": {}, "gpt2": GPT,
    "gemma3n_text": {
        **SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4,
    },
    "gemma4_text": {**SHARED, "global_head_dim": 32},
    "gpt_bigcode": {**GPT, "n_inner": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8}, "gpt_neox": {},
    "gptj": {**GPT, "rotary_dim": 8}, "gpt_oss": {"num_local_experts": 4}, "granite": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]}, "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": {
        **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 32}, "helium": {},
    "hunyuan_v1_dense": {}, "hunyuan_v1_moe": MOE,
    "lfm2": {"layer_types": ["conv", "full_attention"]}, "llama": {}, "mamba": {"state_size": 8}, "ministral": {},
    "mistral": {}, "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256}, "nemotron": {},
    "olmo": {}, "olmo2": {}, "olmo3": FOUR, "olmoe": MOE, "openai-gpt": GPT,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {}, "phi": {}, "phi3": {"tie_word_embeddings": False},
    "phimoe": {"num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1}, "qwen3_moe": MOE,
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 64,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    }, "rwkv": {}, "seed_oss": {}, "smollm3": {},
    "stablelm": {}, "starcoder2": {}, "vaultgemma": {},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
}  # fmt: skip
FROM_TWO = {"pad_token_id": 1}  # positions count from behind the padding
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 32}, "bert": {}, "convbert": {"embedding_size": 64}, "data2vec-text": FROM_TWO,
    "deberta": {}, "deberta-v2": {}, "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 32}, "ernie": {}, "flaubert": {"emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "gemma3_text": {"query_pre_attn_scalar": 16}, "gpt2": GPT, "layoutlm": {}, "llama": {}, "megatron-bert": {},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8}, "mpnet": FROM_TWO,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "qwen3": {},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 64}, "roberta": FROM_TWO,
    "roformer": {"embedding_size": 64}, "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96},
}  # fmt: skip
TEXTS = ("the cat sat on the mat and the dog sat on the log", "rain fell on the town and on the river beside it")
IDS = np.random.default_rng(0).integers(3, 200, (1, 24))
LOST = 1e-4  # float32 sums in another order are 1e-6 of what blocks of this size change
PROMPT = 12  # tokens that are read at once, before the others follow one by one


def make(kind: str, changes: dict[str, Any], auto: Any, folder: Path) -> None:
    """Save a random model of few layers, and a tokenizer."""
    known = CONFIG_MAPPING[kind]
    names = {*known().to_dict(), *getattr(known, "attribute_map", {}), "pad_token_id", "bos_token_id", "eos_token_id"}
    sizes = {name: value for name, value in SIZES.items() if name in names}
    config = known(**{**sizes, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    if model.num_parameters() > 5e6:
        raise ValueError(f"{kind}: its sizes are called otherwise: {model.num_parameters():,} parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):  # 3: experts
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    make_tokenizer([*TEXTS] * 4).save_pretrained(folder)


def in_torch(auto: Any, folder: Path, adapter: Adapter | None = None) -> Any:
    """The logits of a folder's model with an adapter's blocks and head, put in place here."""
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in (adapter.saved if adapter else {}).items():
            model.state_dict()[name].copy_(torch.from_numpy(np.asarray(value)))
        for name, one in (adapter.modules if adapter else {}).items():
            module, blocks = model.get_submodule(name), torch.from_numpy(np.asarray(one.blocks, np.float32))
            delta = torch.block_diag(*blocks)[: one.in_features, : one.out_features]
            module.weight += delta if type(module).__name__ == "Conv1D" else delta.T
        return model(torch.from_numpy(IDS)).logits.numpy()


def figures(kind: str, task: str, work: Path) -> list[str]:
    """The cells of a model's row: modules, and what each road loses."""
    decoder = task == "causal-lm"
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForSequenceClassification
    base, data = work / "base", work / "train.jsonl"
    make(kind, (DECODERS if decoder else CLASSIFIERS).get(kind, {}), auto, base)
    lines = [{"text": text} if decoder else {"text": text, "label": label} for label, text in enumerate(TEXTS)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines * 4), encoding="utf-8")
    train(base, data, work / "adapter", task=task, num_blocks=4, max_steps=3, lr=2e-2, batch_size=4, max_length=16)
    adapter = Adapter.load(work / "adapter")
    wanted = in_torch(auto, base, adapter)
    moved = np.abs(wanted - in_torch(auto, base)).max()
    merge(base, work / "adapter", work / "merged", format="hf")
    merged = np.abs(in_torch(auto, work / "merged") - wanted).max() / moved
    cells = [str(len(adapter.modules)), f"{merged:.1e}"]
    try:
        export(base, {"tuned": work / "adapter"}, work / "branch")
    except DiabloError as error:
        return [*cells, str(error).strip().splitlines()[-1].rpartition(": ")[2].partition(". merge")[0][:60], ""]
    loaded = runtime.load_adapter(work / "branch" / "adapters" / "tuned.onnx_adapter")
    session = runtime.session(work / "branch" / "model.onnx")
    runner = OnnxRunner(session, loaded, cache_shape=cache_shape(work / "branch"))
    cells.append(f"{np.abs(runner.prefill(IDS[0]) - wanted).max() / moved:.1e}")
    if not decoder:
        return [*cells, ""]
    steps = runner.decode(IDS[0, :PROMPT], IDS[0, PROMPT:])  # the logits that tell each token, of those before it
    return [*cells, f"{np.abs(steps - wanted[0, PROMPT - 1 : -1]).max() / moved:.1e}"]


def main(arguments: Sequence[str]) -> int:
    """Print a row for each model; 1 where a road loses something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types of transformers; all that are known here")
    parser.add_argument("--task", choices=("causal-lm", "text-classification"), help="one of the two; both")
    given = parser.parse_args(arguments)
    log.setLevel("ERROR")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| model | task | modules | Hugging Face merge | branch | through the cache |\n|---|---|---|---|---|---|")
    lost = False
    for task, known in (("causal-lm", DECODERS), ("text-classification", CLASSIFIERS)):
        for kind in (given.types or known) if given.task in (None, task) else ():
            with tempfile.TemporaryDirectory() as folder:
                cells = figures(kind, task, Path(folder))
            print(f"| {kind} | {task} | {' | '.join(cells)} |", flush=True)
            lost = lost or any(re.fullmatch(r"[\d.]+e[+-]\d+", cell) and float(cell) > LOST for cell in cells[1:])
    return int(lost)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
