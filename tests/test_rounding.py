"""Learned rounding: it begins at the grid, learns what the float layer gives, and writes what it computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_export.quantization import Float32, fresh_grid
from diablo_export.requantize import Grid, grouped
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import logits
from diablo_export.trainer.grid import set_state
from diablo_export.trainer.layer import is_linear
from diablo_export.trainer.layerwise import Layers
from diablo_export.trainer.model import load_base
from diablo_export.trainer.rounding import RoundedLinear, learn, round_linear

Get = Callable[..., Path]


def rounded(weight: Float32, size: int, symmetric: bool = True) -> Grid:
    codes, scales, zeros = fresh_grid(grouped(weight, size), 4, symmetric)
    return Grid(codes, scales, zeros, 4, symmetric)


def values(grid: Grid, columns: int) -> Float32:
    return grid.values().reshape(len(grid.scales), -1)[:, :columns]


def texts(count: int, seed: int = 0) -> list[Encoded]:
    random = np.random.default_rng(seed)
    return [Encoded(random.integers(3, 90, 24).astype(np.int32), np.ones(24, np.bool_)) for _ in range(count)]


@pytest.fixture
def network(tiny_model: Get) -> nn.Module:
    """Every linear layer rounded to the nearest."""
    found, _ = load_base(tiny_model("llama"), "causal-lm")
    found.requires_grad_(False)
    weights = {name: one.weight.numpy() for name, one in found.named_modules() if is_linear(one)}  # type: ignore[operator]
    round_linear(found, {name: rounded(weight, 16) for name, weight in weights.items()})
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_it_begins_at_its_grid(kind: Any, symmetric: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(50, 12) if kind is nn.Linear else Conv1D(12, 50)
    weight = linear.weight.detach().numpy()
    weight = weight if kind is nn.Linear else weight.T
    grid = rounded(weight, 16, symmetric)
    grid.codes[2] = np.clip(grid.codes[2].astype(int) + 3, 0, 15)  # as far from the weights as GPTQ's may be
    layer, x = RoundedLinear(linear, grid), torch.randn(5, 50)
    wanted = x @ torch.from_numpy(values(grid, 50)).T + linear.bias
    torch.testing.assert_close(layer(x), wanted)
    layer.state = "branch"
    torch.testing.assert_close(layer(x), linear(x))
    done = layer.finish()
    assert np.array_equal(done.codes[..., :2], grid.codes[..., :2]) and np.array_equal(done.scales, grid.scales)
    assert np.array_equal(values(done, 50), values(grid, 50))
    assert (layer.latent - torch.from_numpy(grid.codes)).abs().max() < 0.5  # it still rounds to them


def test_a_group_of_zeros_stays_one() -> None:
    linear = nn.Linear(32, 4)
    with torch.no_grad():
        linear.weight[1] = 0
    layer = RoundedLinear(linear, rounded(linear.weight.detach().numpy(), 16))
    torch.autograd.backward(layer(torch.randn(3, 32)).sum())
    assert layer.latent.grad is not None and torch.isfinite(layer.latent.grad).all()
    assert not values(layer.finish(), 32)[1].any()


def test_answers_are_learned(network: nn.Module) -> None:
    items, other = texts(64), texts(8, seed=1)
    with torch.no_grad():
        wanted = logits(network, other, 0, "branch").log_softmax(-1)
        before = logits(network, other, 0, "grid").log_softmax(-1)
    losses = learn(network, items, steps=120, batch_size=8, lr=0.02)
    assert np.mean(losses[-10:]) < 0.6 * losses[0]  # measured 0.36
    with torch.no_grad():
        after = logits(network, other, 0, "grid").log_softmax(-1)
        again = logits(network, other, 0, "branch").log_softmax(-1)
    assert torch.equal(again, wanted)  # the float model stays
    lost = [float((wanted.exp() * (wanted - one)).sum(-1).mean()) for one in (before, after)]
    assert lost[1] < 0.85 * lost[0]  # of text that it did not see: random weights, random tokens; measured 0.69
    layers = {name: one for name, one in network.named_modules() if isinstance(one, RoundedLinear)}
    changed = 0
    for layer in layers.values():
        grid = layer.finish()
        found = torch.from_numpy(values(grid, layer.weight.shape[1]))
        torch.testing.assert_close(layer._values().detach(), found)  # what is written is what was run
        changed += int((np.abs(grid.scales - layer._grid.scales) > 1e-5 * np.abs(grid.scales)).sum())
    assert changed > 100  # scales are learned, too


def test_a_layer_is_learned_and_put_back(network: nn.Module) -> None:
    items = texts(16)
    with torch.no_grad():
        whole = logits(network, items[:2], 0, "grid")
    layers = Layers(network, "model.layers")
    batches = [layers.listen(items[at : at + 8], 0, ("branch", "grid")) for at in (0, 8)]
    losses = layers.distil(0, layers.layers[0], batches, steps=100, lr=0.02, hard=0.0)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:2])  # measured 0.35
    layers.put_back()
    set_state(network, "grid")
    with torch.no_grad():
        changed = logits(network, items[:2], 0, "grid")
    assert changed.shape == whole.shape and not torch.equal(changed, whole)


@pytest.mark.parametrize("outputs", [32, 48])
def test_a_transposed_weight_is_told_by_the_kind_of_layer(outputs: int) -> None:
    """A square one as well, whose sizes tell nothing."""
    layer = Conv1D(outputs, 32)
    weight = layer.weight.detach().T.contiguous()  # (out, in)
    one = RoundedLinear(layer, rounded(weight.numpy(), 16))
    x = torch.randn(3, 32)
    one.state = "branch"
    torch.testing.assert_close(one(x), layer(x))  # the same float32 products in another order
