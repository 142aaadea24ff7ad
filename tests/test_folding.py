"""Blocks folded into the weight while they train: the same outputs and gradients as a branch; the base comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.layer import DiabloLinear


def layers(
    kind: type, sizes: tuple[int, int], num_blocks: int, dtype: torch.dtype
) -> tuple[DiabloLinear, DiabloLinear]:
    """The same layer twice, as a branch and folded, with random blocks."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        base = nn.Linear(*sizes) if kind is nn.Linear else Conv1D(sizes[1], sizes[0])
        layer = DiabloLinear.from_linear(base.to(dtype), num_blocks=num_blocks)
        with torch.no_grad():
            layer.blocks.normal_()
        made.append(layer)
    fold_blocks(made[1:])
    assert made[1].fold is not None
    return made[0], made[1]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    ("sizes", "num_blocks"), [((24, 12), 4), ((12, 24), 12), ((7, 7), 6), ((9, 100), 4), ((65, 64), 64)]
)
def test_folded_layer_is_the_branch(kind: type, sizes: tuple[int, int], num_blocks: int) -> None:
    branch, folded = layers(kind, sizes, num_blocks, torch.float64)
    x = torch.randn(2, 5, sizes[0], dtype=torch.float64)
    weight = torch.randn(2, 5, sizes[1], dtype=torch.float64)
    found: list[tuple[torch.Tensor, ...]] = []
    for layer in (branch, folded):
        own = x.clone().requires_grad_()
        for _ in range(2):  # the second time with blocks that an optimizer has moved
            y = layer(own)
            (y * weight).sum().backward()
            assert own.grad is not None and layer.blocks.grad is not None
            found.append((y.detach(), own.grad.clone(), layer.blocks.grad.clone()))
            with torch.no_grad():
                layer.blocks.add_(layer.blocks.grad, alpha=-0.1)
            own.grad = layer.blocks.grad = None
    for first, second in zip(found[:2], found[2:], strict=True):
        for one, other in zip(first, second, strict=True):
            # float64, sums of at most 100 terms in another order
            torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


def test_base_comes_back_bit_for_bit() -> None:
    _, layer = layers(nn.Linear, (24, 12), 4, torch.float32)
    torch.manual_seed(0)
    own = nn.Linear(24, 12).weight
    x = torch.randn(3, 24)
    changed = layer(x)
    assert not torch.equal(layer.weight, own)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x)) and torch.equal(layer.weight, own)
    layer.enabled = True
    assert torch.equal(layer(x), changed)
    layer.merge()
    # merging adds the same floats once; what was folded before must not be added twice
    assert torch.equal(layer(x), changed)
    layer.unmerge()
    assert torch.equal(layer.weight, own)


def test_only_what_does_not_lose_updates_is_folded() -> None:
    half = DiabloLinear.from_linear(nn.Linear(8, 8).to(torch.bfloat16), num_blocks=2)
    merged = DiabloLinear.from_linear(nn.Linear(8, 8), num_blocks=2)
    merged.merge()
    fold_blocks([half, merged])
    assert half.fold is None and merged.fold is None


def test_gradients_are_only_worked_out_where_asked_for() -> None:
    _, layer = layers(nn.Linear, (24, 12), 4, torch.float32)
    x: Any = torch.randn(3, 24)
    layer(x).sum().backward()
    assert x.grad is None and layer.blocks.grad is not None
    layer.blocks.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
