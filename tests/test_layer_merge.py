"""Merging layer after layer: what it keeps, what it leaves alone, how little it holds at once."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import layer_merge
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_linears import linears
from diablo_export.converters.onnx_match import match
from diablo_export.errors import CheckpointError, ExportError, InputError
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import logits
from diablo_export.trainer.layerwise import Layers, layers_path
from diablo_export.trainer.model import fill, load_base, load_empty
from tests import tiny
from tests.test_onnx_merge import grid, touched

Get = Callable[..., Path]
FLOAT32 = 1e-4  # of logits of order 10: sums of a hundred products in the same order, masks made anew


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to run every line; quality is measured on real models, by examples/benchmarks/merge_methods.py."""
    for name, value in {"_LENGTH": 32, "_JUDGED": 8, "_FITTED": 96, "STEPS": 40, "_BATCH": 16}.items():
        monkeypatch.setattr(layer_merge, name, value)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model whose inputs span few directions, as real ones do; it in int4; a weak adapter."""
    root = tmp_path_factory.mktemp("narrow")
    model = tiny.make_model("llama", root / "model")
    network, _ = load_base(model, "causal-lm")
    with torch.no_grad():
        table: Any = network.get_parameter("model.embed_tokens.weight")
        table.copy_(torch.randn(len(table), 4) @ torch.randn(4, table.shape[1]) * 0.1)
    network.save_pretrained(model)  # type: ignore[operator]
    (root / "int4").mkdir()
    build_graph(model, root / "int4", quantize="int4", group_size=16)
    return model, root / "int4", tiny.make_adapter(model, root / "adapter", scale=0.01)


def test_it_keeps_what_rounding_loses_and_changes_touched_groups_only(
    narrow: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder, weak = narrow
    given, adapter = folder / "model.onnx", Adapter.load(weak)
    monkeypatch.setattr(layer_merge, "_FITTED", 512)  # of less text codes learn the noise
    monkeypatch.setattr(layer_merge, "STEPS", 80)
    manifest = merge(folder, weak, tmp_path / "out", reference=model, method="layerwise", min_survival=0.1)
    survival = manifest["survival"]
    (row,) = survival["tried"]
    monkeypatch.setattr(layer_merge, "_LEAST_STEPS", 0)
    monkeypatch.setattr(layer_merge, "STEPS", 0)  # codes are where they begin: the nearest, on scales that were fitted
    nearest = merge(folder, weak, tmp_path / "nearest", reference=model, method="layerwise", min_survival=0.1)
    (rounded,) = nearest["survival"]["tried"]
    assert row["kl"] < 0.5 * rounded["kl"] and row["cosine"] > rounded["cosine"], (row, rounded)
    assert survival["runtime_cosine"] > 0.998  # what was measured is the merged file
    assert (survival["method"], survival["passed"], row["steps"]) == ("layerwise", True, 80)
    after = {layer.name: layer for layer in linears(ir.load(tmp_path / "out/model.onnx"))}
    entries = {entry["name"]: entry for entry in manifest["modules"]}
    free = {name: np.ones((layer.out_features, -(-layer.in_features // 16)), np.bool_) for name, layer in after.items()}
    for name, one in match(ir.load(given), adapter.modules).items():
        (piece,) = one.pieces
        free[piece.linear.name][piece.start : piece.stop] &= ~touched(adapter.modules[name].shape, 16)
        assert entries[name]["codes_changed"] > 0
    for layer in linears(ir.load(given)):
        old, new = grid(layer), grid(after[layer.name])
        assert np.array_equal(old.codes[free[layer.name]], new.codes[free[layer.name]])
        assert np.array_equal(old.scales[free[layer.name]], new.scales[free[layer.name]])


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama", tmp_path / "model", num_hidden_layers=5)
    adapter = tiny.make_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(layer_merge, "_LEAST_STEPS", 2)
    monkeypatch.setattr(layer_merge, "STEPS", 2)
    layers: list[weakref.ref[nn.Module]] = []
    held: list[int] = []

    def watched(part: nn.Module, path: str, *rest: Any) -> None:
        gc.collect()
        fill(part, path, *rest)
        if path:
            layers.append(weakref.ref(part))
        alive = [layer for each in layers if (layer := each()) is not None]
        held.append(sum(p.numel() for layer in alive for p in layer.parameters()))

    monkeypatch.setattr(layer_merge, "fill", watched)
    merge(model, adapter, tmp_path / "out", quantize="int4", method="layerwise", min_survival=0.1)
    attention, perceptron, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96, 2 * 64
    assert held == [0] + [attention + perceptron + norms] * 5  # each layer is gone when the next one is loaded


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen2", "gemma3", "phi3", "gpt2", "bert"])
def test_layers_one_after_the_other_are_the_network(architecture: str, tiny_model: Get) -> None:
    folder, task = tiny_model(architecture), "text-classification" if architecture == "bert" else "causal-lm"
    whole, _ = load_base(folder, task)
    network, _ = load_empty(folder, task)
    checkpoint = Checkpoint.open(folder)
    names = [name for name, module in network.named_modules() if name.endswith(("down_proj", "c_proj", "output.dense"))]
    path = layers_path(network, names)
    layers = Layers(network, path)
    fill(network, "", checkpoint, {})
    assert not any(parameter.is_meta for parameter in network.parameters())
    random = np.random.default_rng(0)
    items = [Encoded(random.integers(3, 270, size).astype(np.int32), np.ones(size, np.bool_)) for size in (9, 20)]
    with torch.no_grad():
        batch = layers.listen(items, 0, ("base",))
        for index, layer in enumerate(layers.layers):
            assert all(parameter.is_meta for parameter in layer.parameters())
            fill(layer, f"{path}.{index}", checkpoint, {})
            batch.hidden["base"] = layers.run(index, layer, batch, "base")
        np.testing.assert_allclose(layers.answer(batch, "base"), logits(whole, items, 0, "base"), atol=FLOAT32)


def test_tied_weights_are_found_under_either_name(tiny_model: Get, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama-tied"), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = table = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    network, _ = load_empty(tmp_path / "model", "causal-lm")
    fill(network, "", Checkpoint.open(tmp_path / "model"), {})
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert np.array_equal(network.lm_head.weight.numpy(), table)


def test_buffers_are_loaded_where_they_are_stored(tiny_model: Get, tmp_path: Path) -> None:
    """Gemma 4 scales each layer's output by one."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    save_file(load_file(file) | {"model.scale": np.full(1, 0.5, np.float32)}, file, {"format": "pt"})
    network, _ = load_empty(tmp_path / "model", "causal-lm")
    network.model.register_buffer("scale", torch.ones(1))
    network.model.register_buffer("other", torch.ones(1))
    fill(network, "", Checkpoint.open(tmp_path / "model"), {})
    assert (network.model.scale.item(), network.model.other.item()) == (0.5, 1)


def test_a_model_that_does_not_fit_whole_is_merged_layer_by_layer(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(layer_merge, "_LEAST_STEPS", 2)
    monkeypatch.setattr(layer_merge, "STEPS", 2)
    monkeypatch.setattr(
        "diablo_export.converters.sizes.memory_fault", lambda _, layerwise=False: None if layerwise else "too large"
    )
    with caplog.at_level(logging.WARNING, logger="diablo_export"):
        manifest = merge(
            tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", quantize="int4", min_survival=0.1
        )
    assert manifest["survival"]["method"] == "layerwise"
    assert "distilled layer by layer, as the model does not fit here whole: too large" in caplog.text
    with pytest.raises(InputError, match="too large; use a machine with more memory"):
        merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "no", quantize="int4", method="calibrated")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"picture": "modules.png"}, "--method layerwise does not measure that here"),
        ({"plan": "auto"}, "--plan runs the whole model, and --method layerwise never does"),
    ],
)
def test_what_needs_the_whole_model(
    option: dict[str, Any], message: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    arguments: Any = (tiny_model("llama"), tiny_adapter("llama"), tmp_path / "no")
    with pytest.raises(InputError, match=message):
        merge(*arguments, quantize="int4", method="layerwise", **option)


def test_what_cannot_be_taken_apart(tiny_model: Get) -> None:
    network, _ = load_empty(tiny_model("llama"), "causal-lm")
    with pytest.raises(ExportError, match="has no list of layers that hold the adapted modules"):
        layers_path(network, ["lm_head"])
    network.model.layers[0].self_attn.q_proj = nn.Linear(8, 8, device="meta")
    with pytest.raises(CheckpointError, match=r"lacks model.layers.0.self_attn.q_proj.weight of shape \[8, 8\], found"):
        fill(network.model.layers[0], "model.layers.0", Checkpoint.open(tiny_model("llama")), {})
