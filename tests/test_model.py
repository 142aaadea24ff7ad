"""Base and tuned models: what is loaded, what an adapter does to it, and which adapters are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diablo_export import blockdiag
from diablo_export.adapter import Adapter
from diablo_export.errors import AdapterError, CheckpointError, InputError
from diablo_export.trainer.layer import Conv1D, diablo_layers, set_enabled
from diablo_export.trainer.model import attach, load_base, load_tuned, load_with_fresh
from diablo_export.trainer.targets import choose_targets, wrap_targets
from tests import tiny

IDS = torch.tensor([[1, 17, 42, 200, 5, 99]])


def task(architecture: str) -> str:
    return "text-classification" if architecture == "bert" else "causal-lm"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_tuned_equals_base_with_blocks_in_its_weights(
    architecture: str, tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path]
) -> None:
    adapter = Adapter.load(tiny_adapter(architecture))
    tuned, _ = load_tuned(tiny_model(architecture), adapter, dtype="float64")
    reference, _ = load_base(
        tiny_model(architecture), task(architecture), dtype="float64", labels=adapter.labels or None
    )
    with torch.no_grad():
        for name, module in adapter.modules.items():
            linear: Any = reference.get_submodule(name)
            update = torch.from_numpy(blockdiag.dense(module.blocks, module.in_features, module.out_features))
            linear.weight += update if isinstance(linear, Conv1D) else update.T
        for name, value in adapter.saved.items():
            reference.get_parameter(name).copy_(torch.from_numpy(value))
    assert list(diablo_layers(tuned)) and set(diablo_layers(tuned)) == set(adapter.modules)
    # float64 throughout, but some models compute norms, softmax or rotary angles in float32
    torch.testing.assert_close(logits(tuned), logits(reference), rtol=1e-4, atol=1e-4)
    set_enabled(tuned, False)
    assert (logits(tuned) - logits(reference)).abs().max() > 0.05, "the adapter must do something"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_zero_blocks_give_the_base_bit_for_bit(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    model, _ = load_base(tiny_model(architecture), task(architecture))
    expected = logits(model)
    wrap_targets(model, choose_targets(model, "all-linear"), num_blocks=4)
    assert len(diablo_layers(model)) >= 8
    assert torch.equal(logits(model), expected)


def test_each_gradient_is_its_block_of_the_full_gradient(tiny_model: Callable[[str], Path]) -> None:
    model, _ = load_base(tiny_model("llama"), "causal-lm", dtype="float64")
    wrap_targets(model, choose_targets(model, "all-linear"), num_blocks=4)
    for layer in diablo_layers(model).values():
        layer.base.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    for name, layer in diablo_layers(model).items():
        full = layer.weight.grad
        assert full is not None and layer.blocks.grad is not None
        for block, (inputs, outputs) in enumerate(layer.shape.slices()):
            own = full.T[inputs, outputs]
            # float64 sums over six tokens in another order
            torch.testing.assert_close(layer.blocks.grad[block], own, rtol=1e-9, atol=1e-12, msg=name)
        assert layer.blocks.grad.abs().max() > 0


def test_base_is_frozen_and_in_eval_mode(tiny_model: Callable[[str], Path]) -> None:
    model, tokenizer = load_base(tiny_model("gpt2"), "causal-lm")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token == "<pad>"


def test_dtypes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    half = tiny.make_model("llama", tmp_path / "half")
    model, _ = load_base(half, "causal-lm", dtype="bfloat16")
    model.save_pretrained(half)
    assert next(load_base(half, "causal-lm")[0].parameters()).dtype == torch.float32
    assert next(load_base(half, "causal-lm", dtype="stored")[0].parameters()).dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype is 'int4'; it must be one of float32"):
        load_base(half, "causal-lm", dtype="int4")


def test_classifier_head_is_made_for_the_labels(tiny_model: Callable[[str], Path]) -> None:
    model, _, fresh = load_with_fresh(tiny_model("bert"), "text-classification", labels=["a", "b", "c"])
    assert fresh == ["classifier.bias", "classifier.weight"]
    assert logits(model).shape == (1, 3)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    kept, _, fresh = load_with_fresh(tiny_model("bert"), "text-classification", labels=["a", "b"])
    assert fresh == [] and logits(kept).shape == (1, 2)


def test_a_decoder_classifies_at_the_last_token_whatever_padding_its_config_names(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    row, told = torch.tensor([[17, 42, 5]]), []
    for pad in (7, -1, 0):  # the tokenizer's is 0
        base = shutil.copytree(tiny_model("llama"), tmp_path / str(pad))
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        torch.manual_seed(0)
        model, tokenizer = load_base(base, "text-classification", labels=["a", "b"])
        padded = torch.nn.functional.pad(row, (0, 3), value=tokenizer.pad_token_id)
        with torch.no_grad():
            alone, among = model(row).logits, model(padded, attention_mask=(padded != 0).long()).logits
        # float32 products of other shapes; taken at the padding they differ by tenths
        torch.testing.assert_close(among, alone, rtol=1e-4, atol=1e-5)
        told.append(alone)
    assert torch.equal(told[0], told[2])


def test_decoder_can_classify(tiny_model: Callable[[str], Path]) -> None:
    model, tokenizer, fresh = load_with_fresh(tiny_model("llama"), "text-classification", labels=["a", "b"])
    assert fresh == ["score.weight"]
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert logits(model).shape == (1, 2)


def test_wrong_adapters_are_refused_with_every_fault(
    tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path]
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    model, _ = load_base(tiny_model("llama"), "causal-lm")
    name, module = next(iter(adapter.modules.items()))
    wrong = {
        name: dataclasses.replace(module, in_features=module.in_features - 1),
        "model.absent": dataclasses.replace(module, name="model.absent"),
        "model.norm": dataclasses.replace(module, name="model.norm"),
    }
    with pytest.raises(AdapterError, match="3 of 3 modules do not fit") as error:
        attach(model, dataclasses.replace(adapter, modules=wrong))
    text = str(error.value)
    assert "model.absent: the model has no such module" in text
    assert "model.norm: is a LlamaRMSNorm, not a linear layer" in text
    assert f"the model's layer is {module.in_features} → {module.out_features}, the adapter's is" in text
    with pytest.raises(AdapterError, match=r"lm_head.x: the adapter stores \[2\], the model has no such parameter"):
        attach(model, dataclasses.replace(adapter, saved={"lm_head.x": np.zeros(2, np.float32)}))
    assert not diablo_layers(model), "a refused adapter must leave the model as it was"
    attach(model, adapter)
    with pytest.raises(AdapterError, match="has blocks already"):
        attach(model, adapter)


def test_adapter_of_another_base_is_refused(
    tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tiny.make_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="its base weight has other values than the one this adapter was trained on"):
        load_tuned(other, Adapter.load(tiny_adapter("llama")))
    strange = dataclasses.replace(Adapter.load(tiny_adapter("llama")), task_type="FEATURE_EXTRACTION")
    with pytest.raises(AdapterError, match="task_type is 'FEATURE_EXTRACTION'; known are CAUSAL_LM, SEQ_CLS"):
        load_tuned(tiny_model("llama"), strange)


def test_models_that_cannot_be_used_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task is 'translation'; it must be causal-lm or text-classification"):
        load_base(tiny_model("llama"), "translation")
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_base("./absent", "causal-lm")
    with pytest.raises(CheckpointError, match=r"lacks weights that a causal-lm model needs: .*cls\.predictions"):
        load_base(tiny_model("bert"), "causal-lm")
    broken = shutil.copytree(tiny_model("llama"), tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="quantized with GPTQ in None bits, where 2, 4 and 8 can be read"):
        load_base(broken, "causal-lm")
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(CheckpointError, match=r"transformers cannot load it for causal-lm: .*unheard-of"):
        load_base(broken, "causal-lm")
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is \[64, 96\], by config\.json \[64, 192\]"):
        load_base(broken, "causal-lm")
    (broken / "config.json").write_text(json.dumps(config))
    large = json.loads((broken / "tokenizer.json").read_text())
    tokens = large["model"]["vocab"]
    tokens |= {f"unheard-of-{number}": len(tokens) + number for number in range(1000)}
    (broken / "tokenizer.json").write_text(json.dumps(large))
    with pytest.raises(CheckpointError, match=r"tokenizer has 1,\d+ tokens, .* embeddings for \d+: it is another"):
        load_base(broken, "causal-lm")
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"finds no tokenizer in it .*; copy tokenizer\.json and"):
        load_base(broken, "causal-lm")
