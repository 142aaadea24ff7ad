from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from diablo_export.blockdiag import Array, BlockShape, add_to_weight, apply
from diablo_export.quantization import quantize, unpack
from diablo_export.requantize import Grid, rounded
from diablo_export.trainer.grid import GridLinear, grid_layers, set_state
from tests.test_onnx_merge import touched

SIZE, INPUTS, OUTPUTS = 16, 40, 24  # the last group is padded
FLOAT32 = 1e-5  # sums of 40 products of order 1, in another order


def grid(seed: int = 0, bits: int = 4) -> Grid:
    whole = quantize(np.random.default_rng(seed).normal(size=(OUTPUTS, INPUTS)).astype(np.float32), bits, SIZE)
    codes = unpack(whole.codes, bits, SIZE)
    codes.reshape(OUTPUTS, -1)[:, INPUTS:] = 2 ** (bits - 1)
    return Grid(codes, whole.scales, np.full(whole.scales.shape, 2 ** (bits - 1), np.uint8), bits, True)


def weight(of: Grid) -> Array:
    return of.values().reshape(OUTPUTS, -1)[:, :INPUTS]


def layer(num_blocks: int = 4, bits: int = 4) -> tuple[GridLinear, Grid, Array]:
    shape = BlockShape.for_linear(INPUTS, OUTPUTS, num_blocks)
    blocks = np.random.default_rng(1).normal(0, 0.3, shape.blocks).astype(np.float32)
    made = grid(bits=bits)
    return GridLinear(nn.Linear(INPUTS, OUTPUTS), shape, blocks, made), made, blocks


def outputs(one: GridLinear, state: str, x: Array) -> Array:
    set_state(one, state)  # type: ignore[arg-type]
    with torch.no_grad():
        assert one.bias is not None
        return np.asarray((one(torch.from_numpy(x)) - one.bias).numpy())


@pytest.mark.parametrize("num_blocks", [3, 4])  # 3: blocks padded and ending within a group
def test_three_states(num_blocks: int) -> None:
    one, made, blocks = layer(num_blocks)
    x = np.random.default_rng(2).normal(size=(2, 5, INPUTS)).astype(np.float32)
    base = x @ weight(made).T
    np.testing.assert_allclose(outputs(one, "base", x), base, atol=FLOAT32)
    np.testing.assert_allclose(outputs(one, "branch", x), apply(x, blocks, OUTPUTS, base), atol=FLOAT32)
    np.testing.assert_allclose(outputs(one, "grid", x), base, atol=FLOAT32)  # nothing trained yet
    other = rounded(made.values() + 0.1, made)
    one.begin(other)
    np.testing.assert_allclose(outputs(one, "grid", x), x @ weight(other).T, atol=FLOAT32)
    np.testing.assert_allclose(outputs(one, "base", x), base, atol=FLOAT32)


@pytest.mark.parametrize("num_blocks", [3, 4])
def test_what_is_trained_is_what_is_written(num_blocks: int) -> None:
    one, made, _ = layer(num_blocks)
    assert one.latent is not None
    x = np.random.default_rng(2).normal(size=(7, INPUTS)).astype(np.float32)
    before = outputs(one, "grid", x)
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        one.latent += 2 * torch.randn(one.latent.shape, generator=drawn)
    one.project()
    finished = one.finish()
    np.testing.assert_allclose(outputs(one, "grid", x), x @ weight(finished).T, atol=FLOAT32)
    assert np.abs(before - outputs(one, "grid", x)).max() > 1
    assert finished.codes.max() <= 15 and np.array_equal(finished.scales, made.scales)
    groups = touched(one.shape, SIZE)
    inside = np.repeat(groups, SIZE, 1)[:, :INPUTS]
    changed = (finished.codes != made.codes).reshape(OUTPUTS, -1)
    assert changed[:, :INPUTS][inside].mean() > 0.5, "also beside the blocks, in the groups that they meet"
    assert not changed[:, :INPUTS][~inside].any() and not changed[:, INPUTS:].any()


def test_latents_begin_at_the_target_and_harden() -> None:
    one, made, blocks = layer()
    target = add_to_weight(weight(made), blocks)
    one.begin(made, target)
    x = np.random.default_rng(2).normal(size=(7, INPUTS)).astype(np.float32)
    branch, rounded_ = outputs(one, "branch", x), x @ weight(one.finish()).T
    one.hardness = 0
    # beyond the grid's ends, which a few of the blocks' weights are, latents stop
    reached = np.abs(outputs(one, "grid", x) - branch)
    assert np.median(reached) < 0.01 and np.median(np.abs(rounded_ - branch)) > 0.1
    for hardness in (0.5, 1.0):
        one.hardness = hardness
        between = hardness * rounded_ + (1 - hardness) * branch
        assert np.median(np.abs(outputs(one, "grid", x) - between)) < 0.01
    assert (one.finish().codes != made.codes).mean() > 0.01


def test_latents_begin_on_the_grid_whatever_the_target() -> None:
    one, made, blocks = layer()
    empty = replace(made, scales=np.where(np.arange(OUTPUTS) == 0, np.float32(0), made.scales.T).T)  # a row of zeros
    one.begin(empty, 10 * add_to_weight(weight(empty), blocks))
    assert one.latent is not None
    latent, codes = one.latent.detach(), one.finish().codes.reshape(OUTPUTS, -1)
    assert latent.isfinite().all() and latent.min() == 0 and latent.max() == 15
    assert codes.max() == 15 and (codes[0][touched(one.shape, SIZE).repeat(SIZE, 1)[0]] == 8).all()


def test_latents_begin_near_their_codes() -> None:
    """As far toward the target as rounds to the code: nothing has changed, and what the target pulls at moves first."""
    one, made, blocks = layer()
    target = add_to_weight(weight(made), blocks)
    one.begin(made, target)
    assert one.latent is not None
    free = one.latent.detach().clone()
    one.begin(made, target, near=True)
    codes = one.latent.detach().round()
    np.testing.assert_array_equal(one.finish().codes, made.codes)
    near = (free - codes).abs() < 0.4
    np.testing.assert_array_equal(one.latent.detach()[near], free[near])
    pulled = (free - codes).abs() > 0.5
    assert 0.05 < pulled.float().mean() < 0.95, "both kinds are there"
    moved = (one.latent.detach() - codes)[pulled]
    assert torch.equal(moved.sign(), (free - codes)[pulled].sign()) and moved.abs().min() > 0.39


def test_straight_through() -> None:
    one, _, _ = layer()
    assert one.latent is not None
    x = torch.randn(3, INPUTS)
    one(x).sum().backward()
    gradient = one.latent.grad
    assert gradient is not None
    _, rows = next(iter(one.shape.slices()))
    whole = slice(0, SIZE)  # the block's ten inputs lie in one group
    scale = torch.from_numpy(np.repeat(grid().scales, SIZE, 1)[rows, whole].T.copy())
    torch.testing.assert_close(gradient[0][whole], x.sum(0)[whole, None] * scale, rtol=1e-4, atol=1e-5)


def test_a_float_layer_is_exact() -> None:
    shape = BlockShape.for_linear(INPUTS, OUTPUTS, 4)
    one = GridLinear(nn.Linear(INPUTS, OUTPUTS), shape, np.ones(shape.blocks, np.float32), None)
    x = np.random.default_rng(2).normal(size=(3, INPUTS)).astype(np.float32)
    assert one.latent is None
    assert np.array_equal(outputs(one, "grid", x), outputs(one, "branch", x))
    assert "float" in repr(one)


def test_layers_of_a_network() -> None:
    one, _, _ = layer()
    network = nn.Sequential(nn.Linear(INPUTS, INPUTS), one)
    assert list(grid_layers(network)) == ["1"]
    set_state(network, "base")
    assert one.state == "base"
    assert "4 bits" in repr(network)
