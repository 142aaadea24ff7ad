"""DiaBlo through PEFT: the layer against the trainer's own, merging, several adapters, configs, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

pytest.importorskip("peft")

from peft import PeftConfig, PeftModel, get_peft_model

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import BlockShape
from diablo_export.errors import AdapterError
from diablo_export.peft import DiabloConfig, DiabloLayer, DiabloPeftError
from diablo_export.trainer.layer import DiabloLinear
from tests.onnx_runs import IDS

Folder = Callable[[str], Path]
# in, out, num_blocks: dividing; both padded; input padded only; output padded only; one block
SIZES = [(12, 8, 4), (10, 7, 4), (10, 8, 4), (8, 10, 4), (6, 6, 1)]
# float32 sums of weights rounded once more by the merge, after two layers; logits are of magnitude 10
MERGED = 1e-4


def layer_of(kind: str, in_features: int, out_features: int, num_blocks: int, names: tuple[str, ...]) -> DiabloLayer:
    torch.manual_seed(0)
    base: nn.Module = Conv1D(out_features, in_features) if kind == "conv1d" else nn.Linear(in_features, out_features)
    layer = DiabloLayer(base, names[0])
    for name in names:
        layer.add_adapter(name, BlockShape.for_linear(in_features, out_features, num_blocks), zeros=False)
    return layer


def llama(tiny_model: Folder, **options: Any) -> Any:
    """A tiny Llama with random blocks of one adapter, in eval mode."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    return get_peft_model(base, DiabloConfig(**{"num_blocks": 4, "init_weights": False, **options})).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **more: Any) -> Tensor:
    out: Tensor = model(input_ids=torch.from_numpy(IDS) if ids is None else ids, **more).logits
    return out


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("in_features", "out_features", "num_blocks"), SIZES)
def test_layer_is_the_trainers_layer(kind: str, in_features: int, out_features: int, num_blocks: int) -> None:
    layer = layer_of(kind, in_features, out_features, num_blocks, ("a",))
    own = DiabloLinear.from_linear(layer.base_layer, blocks=layer.blocks("a").detach())
    x = torch.randn(2, 3, in_features)
    assert torch.equal(layer(x), own(x))
    layer(x).square().sum().backward()
    own(x).square().sum().backward()
    assert own.blocks.grad is not None and torch.equal(layer.blocks("a").grad, own.blocks.grad)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("in_features", "out_features", "num_blocks"), SIZES)
def test_two_merged_adapters_unmerge_to_the_same_bits(
    kind: str, in_features: int, out_features: int, num_blocks: int
) -> None:
    layer = layer_of(kind, in_features, out_features, num_blocks, ("a", "b"))
    layer.set_adapter(["a", "b"])
    weight = layer.weight.detach().clone()
    x = torch.randn(5, in_features)
    expected = layer(x)
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["a", "b"]
    # sums of at most 12 products of float32 numbers around 1, in another order
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        layer.weight.detach(), weight + layer.get_delta_weight("a") + layer.get_delta_weight("b"), rtol=0, atol=1e-6
    )
    merged, own = layer.weight.detach().clone(), layer.base_weight()
    assert own is not None and torch.equal(layer.weight, merged), "asking for the base leaves the merged weight"
    np.testing.assert_array_equal(own, weight.numpy().T if kind == "conv1d" else weight.numpy())
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and not layer.merged


def test_a_merged_adapter_is_taken_out_where_it_is_turned_off_and_no_part_of_mixed_batches() -> None:
    layer, x = layer_of("linear", 8, 8, 4, ("a",)), torch.randn(2, 3, 8)
    base = layer.base_layer(x)
    layer.merge()
    with pytest.raises(DiabloPeftError, match="Cannot pass `adapter_names` when there are merged adapters"):
        layer(x, adapter_names=["a", "__base__"])
    assert not torch.equal(layer(x), base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base) and not layer.merged


def test_merge_in_bfloat16_rounds_once_and_changes_only_what_blocks_meet() -> None:
    layer = layer_of("linear", 8, 8, 4, ("a",))
    layer.base_layer.to(torch.bfloat16)
    before = layer.weight.detach().clone()
    delta = layer.get_delta_weight("a")
    layer.merge()
    assert torch.equal(layer.weight, (before.float() + delta).to(torch.bfloat16))
    assert torch.equal(layer.weight[delta == 0], before[delta == 0])


def test_safe_merge_refuses_nan_and_leaves_the_weight() -> None:
    layer = layer_of("linear", 8, 8, 4, ("a",))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.blocks("a")[3, 1, 1] = float("nan")
    with pytest.raises(
        DiabloPeftError, match=r"NaNs detected in the merged weights\. The adapter a seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_only_blocks_are_trained_and_start_at_zero(tiny_model: Folder) -> None:
    model = llama(tiny_model, init_weights=True)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    # the paper's projections, of both layers
    modules = {re.sub(r".*\.", "", name.partition(".diablo_blocks")[0]) for name in trained}
    assert modules == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"} and len(trained) == 10
    assert all(name.endswith(".diablo_blocks.default.weight") for name in trained)
    assert not any(value.any() for value in trained.values())
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("targets", "options", "count"),
    [
        (["q_proj"], {}, 2),
        (r".*\.1\.self_attn\.[qk]_proj", {}, 2),
        ("all-linear", {}, 14),
        (["q_proj", "v_proj"], {"exclude_modules": ["0.self_attn.v_proj"]}, 3),
        (["q_proj", "v_proj"], {"layers_to_transform": [1]}, 2),
        (None, {"layers_to_transform": [1], "layers_pattern": "layers"}, 5),
    ],
)
def test_targets(tiny_model: Folder, targets: Any, options: dict[str, Any], count: int) -> None:
    model = llama(tiny_model, target_modules=targets, **options)
    assert sum(isinstance(module, DiabloLayer) for module in model.modules()) == count


def test_several_adapters(tiny_model: Folder) -> None:
    model = llama(tiny_model)
    with model.disable_adapter():
        base = logits(model)
    first = logits(model)
    model.add_adapter("other", DiabloConfig(num_blocks=8, target_modules=["o_proj", "q_proj"], init_weights=False))
    assert torch.equal(logits(model), first)  # adding does not make active
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(other, first) and not torch.equal(other, base)

    ids = torch.from_numpy(IDS).repeat(3, 1)
    mixed = logits(model, ids, adapter_names=["default", "__base__", "other"])
    # a batch of three sums in another order than one row alone
    for row, alone in zip(mixed, (first, base, other), strict=True):
        torch.testing.assert_close(row, alone[0], rtol=0, atol=MERGED)
    beams = {"max_new_tokens": 4, "num_beams": 3, "pad_token_id": 0}  # generation repeats each row for its beams
    together = model.generate(ids[:2], adapter_names=["__base__", "other"], **beams)
    assert torch.equal(together[1:], model.generate(ids[:1], **beams))
    with pytest.raises(DiabloPeftError, match="non-existing adapter\\(s\\): nobody"):
        logits(model, ids, adapter_names=["default", "nobody", "other"])
    with pytest.raises(DiabloPeftError, match="but got 2 and 3 respectively"):
        logits(model, ids, adapter_names=["default", "other"])

    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, DiabloLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), both, rtol=0, atol=MERGED)


def test_deleting_an_adapter_leaves_the_other(tiny_model: Folder) -> None:
    model = llama(tiny_model)
    first = logits(model)
    model.add_adapter("other", DiabloConfig(num_blocks=8, target_modules=["q_proj"], init_weights=False))
    model.set_adapter("other")
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not [name for name, _ in model.named_parameters() if ".other." in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "bias is 'all', only 'none' is possible: the adapter format has no place for biases"),
        ({"num_blocks": 0}, "num_blocks is 0, it must be a whole number, at least 1"),
        ({"num_blocks": "8"}, "num_blocks is '8', it must be a whole number, at least 1"),
        ({"num_blocks": 8.0}, "num_blocks is 8.0, it must be a whole number, at least 1"),
        ({"num_blocks": None}, "num_blocks is None, it must be a whole number, at least 1"),
        ({"num_blocks": True}, "num_blocks is True, it must be a whole number, at least 1"),
        ({"target_modules": "(q_proj"}, "target_modules '(q_proj' is no regular expression (missing )"),
        ({"exclude_modules": "*"}, "exclude_modules '*' is no regular expression (nothing to repeat"),
        ({"format_version": 2}, "format_version is 2, this program reads 1"),
        ({"layers_pattern": "layers"}, "layers_pattern is given without layers_to_transform"),
        ({"target_modules": "q_proj", "layers_to_transform": [1]}, "go with a list of target_modules"),
    ],
)
def test_configs_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DiabloConfig(**options)


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = DiabloConfig(num_blocks=8, target_modules=["v_proj", "q_proj"], exclude_modules=["0.q_proj"])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DiabloConfig) and loaded.peft_type == "DIABLO" and loaded.num_blocks == 8
    assert loaded.to_dict() == config.to_dict()


def test_targets_that_cannot_take_blocks_are_all_named_and_the_model_is_left_alone(tiny_model: Folder) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with pytest.raises(DiabloPeftError) as error:
        get_peft_model(base, DiabloConfig(num_blocks=60, target_modules=["k_proj", "q_proj", "embed_tokens"]))
    message = str(error.value)
    assert "model.layers.0.self_attn.k_proj: num_blocks is 60, but a layer of 64 inputs and 32 outputs" in message
    assert "model.layers.1.self_attn.k_proj" in message and "q_proj" not in message
    assert "model.embed_tokens: Target module Embedding is not supported" in message
    assert not any(isinstance(module, DiabloLayer) for module in base.modules())


def test_all_linear_layers_that_cannot_take_blocks_leave_the_model_alone(tiny_model: Folder) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with pytest.raises(DiabloPeftError, match=r"(?s)layers.0.self_attn.k_proj: num_blocks is 60.*layers.1.self_attn"):
        get_peft_model(base, DiabloConfig(num_blocks=60, target_modules="all-linear"))
    assert not any(isinstance(module, DiabloLayer) for module in base.modules())


@pytest.mark.parametrize("first", [["q_proj", "lm_head"], "all-linear"])
def test_a_second_adapter_takes_all_linear_layers_too(first: Any, tiny_model: Folder) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=first))
    model.add_adapter("second", DiabloConfig(num_blocks=2, target_modules="all-linear"))
    layers = {name: module for name, module in base.named_modules() if isinstance(module, DiabloLayer)}
    taken = {name.rpartition(".")[2] for name, layer in layers.items() if "second" in layer.diablo_blocks}
    assert taken == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_attention_that_never_calls_its_projection_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(DiabloPeftError, match="out_proj: Target module NonDynamicallyQuantizableLinear"):
        get_peft_model(model, DiabloConfig(num_blocks=2, target_modules=["out_proj"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its base weight has other values than the one this adapter was trained on"),
        ({"intermediate_size": 128}, "the model's layer is 64 → 128, the adapter's is 64 → 96"),
        ({"num_hidden_layers": 1}, "model.layers.1.mlp.down_proj: the model has no such module"),
    ],
)
def test_another_base_is_refused(tiny_adapter: Folder, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from tests import tiny

    other = AutoModelForCausalLM.from_pretrained(tiny.make_model("llama", tmp_path / "other", **changes))
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(other, tiny_adapter("llama"))


def test_quantized_layers_carry_blocks_and_refuse_a_merge() -> None:
    class PackedLinear(nn.Module):
        """Stands for the layers of quantization libraries: sizes, a packed weight, and a forward of its own."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = linear.weight.detach().abs().max() / 127
            self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.get_buffer("weight").float() * self.scale).T

    torch.manual_seed(0)
    base = nn.ModuleDict({"packed": PackedLinear(nn.Linear(8, 12)), "plain": nn.Linear(8, 12)})
    own = base["packed"]
    model = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=["packed", "plain"], init_weights=False))
    layer = model.base_model.model["packed"]
    x = torch.randn(3, 8)
    # the same product of eight terms, computed densely
    torch.testing.assert_close(layer(x), own(x) + x @ layer.get_delta_weight("default").T, rtol=0, atol=1e-5)
    weight = model.base_model.model["plain"].weight.detach().clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(DiabloPeftError, match="merged into quantized layers \\(packed: PackedLinear\\)"):
            merge()
    assert torch.equal(model.base_model.model["plain"].weight, weight)
    with pytest.raises(DiabloPeftError, match="merged into quantized layers \\(PackedLinear\\)"):
        layer.merge()


def test_adapter_of_the_papers_checkpoint_has_its_own_block_sizes(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    """Such an adapter knows no num_blocks, only each module's blocks."""
    import dataclasses

    whole = Adapter.load(tiny_adapter("llama"))
    dataclasses.replace(whole, num_blocks=0, target_modules=[]).save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model = PeftModel.from_pretrained(base, tmp_path)
    layers = [module for module in model.modules() if isinstance(module, DiabloLayer)]
    assert len(layers) == len(whole.modules)
