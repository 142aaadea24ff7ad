from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export import runtime
from diablo_export.adapter import Adapter, base_weight
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import InputError
from diablo_export.manifest import read_manifest
from diablo_export.measure.exported_base import rebuild
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.places import Graph
from tests import exports, tiny

Get = Callable[[str], Path]
IDS = np.array([5, 17, 254, 3, 90, 41, 7, 200, 11], np.int64)


def logits(out: Path, **options: Any) -> Any:
    return OnnxRunner(runtime.session(out / "model.onnx", **options), cache_shape=cache_shape(out)).prefill(IDS)


# what the layouts are: whole and fused weights, stored (in, out) and (out, in), float32, float16, codes
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"precision": "fp16"}),
        ("llama", {"quantize": "int8"}),
        ("llama", {"quantize": "int4"}),
        ("llama", {"quantize": "int4", "group_size": 16}),
        ("phi3", {}),
        ("phi3", {"quantize": "int4"}),
        pytest.param("gpt2", {"quantize": "int4"}, marks=pytest.mark.slow),
        pytest.param("bert", {}, marks=pytest.mark.slow),
    ],
)
def test_the_rebuilt_base_is_the_export_of_the_base(
    architecture: str, options: dict[str, Any], tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    """Bit for bit what the same road makes of zero blocks, and far from the merged model."""
    model, adapter = tiny_model(architecture), tiny_adapter(architecture)
    zero = exports.scaled(adapter, tmp_path / "zero", 0)
    out = exports.merged(model, adapter, tmp_path / "out", **options)
    base = exports.merged(model, zero, tmp_path / "base", **options)
    loaded = Adapter.load(adapter)
    rebuilt = rebuild(out / "model.onnx", read_manifest(out)["modules"], Checkpoint.open(model), loaded)
    assert rebuilt.foreign == []
    found = logits(out, initializers=rebuilt.initializers)
    np.testing.assert_array_equal(found, logits(base))
    assert np.abs(found - logits(out)).max() > 0.01


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_a_difference_where_no_block_reaches_is_found(quantize: str, tiny_model: Get, tmp_path: Path) -> None:
    """What was merged reaches all of the matrix; the adapter's four blocks, a quarter of it."""
    model, targets = tiny_model("llama"), ("q_proj", "up_proj")
    whole = tiny.make_adapter(model, tmp_path / "whole", num_blocks=1, targets=targets)
    quarter = tiny.make_adapter(model, tmp_path / "quarter", num_blocks=4, targets=targets)
    out = exports.merged(model, whole, tmp_path / "out", quantize=quantize)
    modules, checkpoint = read_manifest(out)["modules"], Checkpoint.open(model)
    assert rebuild(out / "model.onnx", modules, checkpoint, Adapter.load(whole)).foreign == []
    assert len(rebuild(out / "model.onnx", modules, checkpoint, Adapter.load(quarter)).foreign) == 4
    only_q = Adapter.load(tiny.make_adapter(model, tmp_path / "q", targets=("q_proj",)))
    with pytest.raises(InputError, match=r"holds a merged model\.layers\..\.mlp\.up_proj, which the adapter .* lacks"):
        rebuild(out / "model.onnx", modules, checkpoint, only_q)


def test_a_manifest_of_another_model_is_named(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    modules = read_manifest(out)["modules"]
    modules[0]["weight"] = "nowhere.weight"
    loaded, checkpoint = Adapter.load(tiny_adapter("llama")), Checkpoint.open(tiny_model("llama"))
    with pytest.raises(InputError, match=r"has no initializer nowhere\.weight, which the manifest names"):
        rebuild(out / "model.onnx", modules, checkpoint, loaded)


def test_base_weights_are_out_by_in(tiny_model: Get) -> None:
    gpt2 = Checkpoint.open(tiny_model("gpt2"))
    assert base_weight(gpt2, "transformer.h.0.attn.c_attn").shape == (192, 64)  # stored (64, 192)
    tied = Checkpoint.open(tiny_model("llama-tied"))
    assert base_weight(tied, "lm_head").shape == (320, 64)
    with pytest.raises(InputError, match=r"has no weight for model\.layers\.9\.mlp\.up_proj; give the base"):
        base_weight(tied, "model.layers.9.mlp.up_proj")


def test_data_that_is_a_link_is_told(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """As copying with hard links leaves it: onnxruntime reads it, onnx does not."""
    out = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    (tmp_path / "second").hardlink_to(out / "model.onnx.data")
    graph = Graph(out / "model.onnx")
    large = max(graph.stored.values(), key=lambda tensor: np.prod(tensor.dims))
    with pytest.raises(InputError, match=rf"model\.onnx: the data of {large.name} cannot be read: .*; copy the folder"):
        graph.read(large.name)
