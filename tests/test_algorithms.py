"""k-quant and HQQ give onnxruntime's own codes; GPTQ keeps the outputs; moments are those of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as producers

from diablo_export.adapter import Adapter
from diablo_export.algorithms import ALGORITHMS, Algorithm
from diablo_export.quantization import Float32, quantize
from diablo_export.requantize import Grid, grouped, output_error
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.model import load_tuned
from diablo_export.trainer.moments import InputMoments
from tests.test_onnx_producers import OUT, made_by, weights

Get = Callable[..., Path]


def moments_of(columns: int, seed: int = 0) -> Float32:
    """Of inputs that vary together: a few directions carry most."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(600, 6)) @ random.normal(size=(6, columns)) + 0.3 * random.normal(size=(600, columns))
    return np.asarray(x.T @ x / len(x), np.float32)


def values(grid: Grid, columns: int) -> Float32:
    return grid.values().reshape(len(grid.scales), -1)[:, :columns]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("k_quant", producers.KQuantWeightOnlyQuantConfig(customized_weight_config={})),
        ("hqq", producers.HQQWeightOnlyQuantConfig(block_size=32, bits=4)),
    ],
)
def test_codes_are_onnxruntimes(name: str, config: Any) -> None:
    stored = {
        value.name: onnx.numpy_helper.to_array(value) for value in made_by(config, block_size=32).graph.initializer
    }
    ours = Algorithm(name).quantize("a", 4, 32, False, weights("a"))
    assert ours.zero_points is not None
    of_a = {key: value for key, value in stored.items() if key.startswith(("m.a.", "a_"))}
    codes = next(value for value in of_a.values() if value.ndim == 3)
    assert np.array_equal(codes, ours.codes)
    flat = [value.reshape(OUT, -1) for value in of_a.values() if value.ndim < 3]
    assert any(np.array_equal(value, ours.scales) for value in flat)
    assert any(np.array_equal(value, ours.zero_points) for value in flat)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "bits"), [(96, 4), (80, 4), (300, 2), (64, 8)])
def test_gptq_keeps_outputs(columns: int, bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(1).normal(size=(40, columns)).astype(np.float32)
    moments = moments_of(columns)
    grid = Algorithm("gptq", lambda name: moments).grid("a", bits, 32, symmetric, weight)
    nearest = quantize(weight, bits, 32, symmetric)
    assert grid.codes.max() <= grid.top and grid.codes.shape == (40, *nearest.codes.shape[1:2], 32)
    wide = np.zeros((grid.codes[0].size,) * 2, np.float32)
    wide[:columns, :columns] = moments
    target = grouped(weight, 32)
    rounded = Algorithm("gptq", lambda name: np.eye(columns, dtype=np.float32)).grid("a", bits, 32, symmetric, weight)
    lost, before = (output_error(one, target, wide).sum() for one in (grid, rounded))
    # six directions carry 0.95 of the inputs and 32 codes and more can make up for each: measured 0.02 to 0.11
    assert lost < 0.25 * before
    # without anything that varies together it is rounding to the nearest, on a scale that was searched for
    exact = rounded.values() - target
    assert (np.abs(exact) <= 0.5001 * np.abs(rounded.scales)[..., None]).mean() > 0.9


def test_padding_and_zeros() -> None:
    weight = np.random.default_rng(2).normal(size=(8, 50)).astype(np.float32)
    weight[3] = 0
    for name in ALGORITHMS:
        grid = Algorithm(name, lambda module: moments_of(50)).grid("a", 4, 16, False, weight)
        found = values(grid, 50)
        assert np.isfinite(found).all() and not found[3].any()
        assert np.abs(found - weight).mean() < 0.15  # a sixth of a step of 4 bits over ±2.5 is 0.05


def test_moments_are_taken_when_asked_for(tiny_model: Get, tiny_adapter: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = load_tuned(tiny_model("llama"), Adapter.load(tiny_adapter("llama")))
    items = [Encoded(np.arange(3, 19, dtype=np.int32), np.ones(16, np.bool_))] * 3
    seen: dict[str, torch.Tensor] = {}
    name = "model.layers.1.mlp.down_proj"
    handle = diablo_layers(network)[name].register_forward_pre_hook(lambda module, given: seen.update({name: given[0]}))
    monkeypatch.setattr("diablo_export.trainer.moments._KEPT", 4 * 96**2)  # one layer at a time
    moments = InputMoments(network, items, batch_size=2)
    found = moments(name)
    handle.remove()
    x = seen[name].reshape(-1, 96).detach().numpy()
    np.testing.assert_allclose(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert moments("lm_head").shape == (64, 64)  # also without blocks
    assert list(moments._found) == ["lm_head"]
