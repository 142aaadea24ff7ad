"""Which modules get blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diablo_export.errors import InputError
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.model import load_base
from diablo_export.trainer.targets import choose_targets, short_names, wrap_targets


def model(folder: Path, task: str = "causal-lm") -> torch.nn.Module:
    return load_base(folder, task)[0]


@pytest.mark.parametrize(
    ("architecture", "leaves"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}),  # the paper's
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_default_targets(architecture: str, leaves: set[str], tiny_model: Callable[[str], Path]) -> None:
    network = model(tiny_model(architecture))
    targets = choose_targets(network)
    assert {name.rpartition(".")[2] for name in targets} == leaves
    assert len(targets) == 2 * (len(leaves) + (architecture == "gpt2"))  # gpt2 has two c_proj in each of its two blocks
    assert short_names(network, targets) == sorted(leaves)


def test_bert_targets_are_the_six_linears_of_each_block(tiny_model: Callable[[str], Path]) -> None:
    network = model(tiny_model("bert"), "text-classification")
    targets = choose_targets(network)
    assert len(targets) == 12 and all(".layer." in name for name in targets)
    assert short_names(network, targets) == targets, "`dense` alone would also name the pooler's"


def test_names_endings_and_expressions(tiny_model: Callable[[str], Path]) -> None:
    network = model(tiny_model("llama"))
    assert choose_targets(network, ["v_proj", "self_attn.q_proj"]) == [
        f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "v_proj")
    ]
    assert choose_targets(network, r"model\.layers\.1\..*(up|down)_proj") == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert len(choose_targets(network, "all-linear")) == 14
    assert choose_targets(network, "lm_head") == ["lm_head"]


def test_unknown_name_lists_what_exists(tiny_model: Callable[[str], Path]) -> None:
    network = model(tiny_model("llama"))
    with pytest.raises(InputError, match=r"target module 'qproj' matches no linear layer; the model has:") as error:
        choose_targets(network, ["v_proj", "qproj"])
    assert "model.layers.*.self_attn.q_proj (2)" in str(error.value) and "lm_head" in str(error.value)
    with pytest.raises(InputError, match=r"'\(' is no module name and no regular expression"):
        choose_targets(network, "(")


def test_tied_weights_are_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"share their weight .*: lm_head with model.embed_tokens"):
        choose_targets(model(tiny_model("llama-tied")), "lm_head")


def test_too_many_blocks_lists_the_modules(tiny_model: Callable[[str], Path]) -> None:
    network = model(tiny_model("llama"))
    with pytest.raises(
        InputError, match=r"num_blocks is 64, which 4 of 10 .* the largest that fits all is 32"
    ) as error:
        wrap_targets(network, choose_targets(network), 64)
    assert "model.layers.0.self_attn.k_proj: 64 → 32" in str(error.value)
    assert not diablo_layers(network)


def test_uncovered_outputs_are_warned_about(
    tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    network = model(tiny_model("llama"))
    with caplog.at_level(logging.WARNING, "diablo_export"):
        wrap_targets(network, choose_targets(network, "q_proj"), 4)
        assert not caplog.text
        wrap_targets(network, choose_targets(network, "up_proj"), 60)  # 64 → 96: blocks of 2 × 2, 48 of them
    assert "model.layers.0.mlp.up_proj: 64 of 96 outputs" in caplog.text


def test_what_chooses_among_experts_is_left_out() -> None:
    """Phi-MoE's router is a linear layer."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = PhimoeForCausalLM(PhimoeConfig(**sizes, vocab_size=64, num_key_value_heads=2, num_local_experts=4))
    targets = choose_targets(network, "all-linear")
    assert {name.rpartition(".")[2] for name in targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert choose_targets(network, "router") == ["model.layers.0.mlp.router"]
