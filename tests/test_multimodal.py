"""Models of text and images: blocks in the language model, learned from text; what sees images stays as it is."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.errors import InputError
from diablo_export.measure.parity import parity
from diablo_export.trainer.model import load_base, load_tuned
from diablo_export.trainer.train import train
from tests import tiny
from tests.exports import SMALL

TEXT = tiny.SIZES | {"tie_word_embeddings": False}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
TURNS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
# kind → the sizes of its language model and of what sees images; each stores its language model under another name
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ({**tiny.SIZES, "query_pre_attn_scalar": 16, "sliding_window": 128}, VISION),
    "Llava": ({**TEXT, "model_type": "llama"}, {**VISION, "model_type": "clip_vision_model"}),
    "Mistral3": ({**TEXT, "model_type": "mistral"}, {**VISION, "model_type": "pixtral"}),
    "Qwen2_5_VL": ({**TEXT, **TURNS}, QWEN),
    "Gemma4": ({**tiny.SIZES, **tiny.ARCHITECTURES["gemma4"][1]}, VISION),
    "Qwen3_5": ({**TEXT, **tiny.ARCHITECTURES["qwen3_5"][1]}, {**QWEN, "num_position_embeddings": 16}),
    "Qwen3VL": ({**TEXT, **TURNS}, {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
}
LAYERS = {"Gemma4": 32, "Qwen3_5": 15}  # linear ones of their language models; the others have 14


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:

    @functools.cache
    def make(kind: str) -> Path:
        text, vision = KINDS[kind]
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
        torch.manual_seed(0)
        network = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.15)
        place = tmp_path_factory.mktemp(kind) / "model"
        network.save_pretrained(place)
        tiny.make_tokenizer(place)
        return place

    return make


@pytest.fixture(scope="module")
def adapter(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:

    @functools.cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{kind}-adapter")
        (folder / "text.jsonl").write_text(json.dumps({"text": "the cat sat on the mat and the dog sat. " * 6}))
        place = folder / "adapter"
        how: dict[str, Any] = {"num_blocks": 4, "max_steps": 3, "max_length": 8, "batch_size": 1, "lr": 0.02}
        train(model(kind), folder / "text.jsonl", place, target_modules="all-linear", **how)
        return place

    return make


def logits(network: torch.nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(network(input_ids=torch.tensor([[1, 5, 6, 7, 9]])).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_of_text_is_merged_and_the_rest_stays(
    kind: str, model: Callable[[str], Path], adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    base, learned = model(kind), Adapter.load(adapter(kind))
    count = LAYERS.get(kind, 14)
    assert len(learned.modules) == count and all("language_model" in name for name in learned.modules)
    merge(base, adapter(kind), tmp_path / "out")
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    merged = {info.name for name in learned.modules if (info := before.find(f"{name}.weight"))}
    changed = {info.name for info in before if info.read().tobytes() != after.tensors[info.name].read().tobytes()}
    assert changed == merged and len(merged) == count and set(before.tensors) == set(after.tensors)
    tuned = logits(load_tuned(base, learned)[0])
    # float32 sums in another order
    np.testing.assert_allclose(logits(load_base(tmp_path / "out", "causal-lm")[0]), tuned, rtol=0, atol=2e-5)
    assert np.abs(tuned - logits(load_base(base, "causal-lm")[0])).max() > 0.1


@pytest.mark.parametrize(
    "kind", ["Gemma3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "Gemma3")]
)
def test_its_language_model_goes_to_onnx(
    kind: str, model: Callable[[str], Path], adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    export(model(kind), adapter(kind), tmp_path / "out")
    report = parity(tmp_path / "out", **SMALL)
    assert report["verdict"] == "pass" and report["adapter"]["alive"]


def test_layers_that_no_text_comes_to_are_no_targets(model: Callable[[str], Path], tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat. " * 6}))
    with pytest.raises(InputError, match="target module 'fc1' matches no linear layer; the model has"):
        train(model("Gemma3"), data, tmp_path / "a", target_modules=["fc1"], num_blocks=4)
