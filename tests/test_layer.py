"""The torch layer against the numpy reference, its gradients against the full gradient, merge and unmerge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_export import blockdiag
from diablo_export.errors import InputError
from diablo_export.trainer.layer import DiabloLinear, diablo_layers, set_enabled

# in, out, num_blocks: dividing; both padded; input padded only; output padded only; coverage lost; one block
SIZES = [(12, 8, 4), (10, 7, 4), (10, 8, 4), (8, 10, 4), (9, 100, 4), (5, 64, 5), (6, 6, 1), (7, 7, 7)]
KINDS = ["linear", "linear-bias", "conv1d"]


def base(kind: str, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        layer: nn.Module = Conv1D(out_features, in_features)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(in_features, out_features, bias=kind == "linear-bias")
    return layer.to(dtype)


def with_random_blocks(layer: nn.Module, num_blocks: int) -> DiabloLinear:
    wrapped = DiabloLinear.from_linear(layer, num_blocks=num_blocks)
    return DiabloLinear.from_linear(layer, blocks=torch.randn(wrapped.shape.blocks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("in_features", "out_features", "num_blocks"), SIZES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0), (2, 1, 3)])
def test_forward_equals_reference(
    kind: str, in_features: int, out_features: int, num_blocks: int, leading: tuple[int, ...]
) -> None:
    layer = with_random_blocks(base(kind, in_features, out_features, torch.float64), num_blocks)
    x = torch.randn(*leading, in_features, dtype=torch.float64)
    expected = blockdiag.apply(
        x.numpy(), layer.blocks.detach().numpy(), out_features, y0=layer.base(x).detach().numpy()
    )
    # float64 sums of at most ten terms, in another order
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("in_features", "out_features", "num_blocks"), SIZES)
def test_block_gradient_is_that_block_of_the_full_gradient(
    kind: str, in_features: int, out_features: int, num_blocks: int
) -> None:
    layer = DiabloLinear.from_linear(base(kind, in_features, out_features, torch.float64), num_blocks=num_blocks)
    layer.base.requires_grad_(True)
    x = torch.randn(2, 5, in_features, dtype=torch.float64)
    layer(x).square().sum().backward()
    full = layer.weight.grad if kind == "conv1d" else layer.weight.grad.T  # type: ignore[union-attr]
    gradient = layer.blocks.grad
    assert full is not None and gradient is not None
    rest = gradient.clone()
    for block, (i, o) in enumerate(layer.shape.slices()):
        own = gradient[block, : i.stop - i.start, : o.stop - o.start]
        torch.testing.assert_close(own, full[i, o], rtol=0, atol=1e-11)  # the same float64 sums in another order
        rest[block, : i.stop - i.start, : o.stop - o.start] = 0
    assert not rest.any(), "padding must get no gradient"
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_blocks_give_the_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    for in_features, out_features, num_blocks in SIZES:
        linear = base(kind, in_features, out_features, dtype)
        x = torch.randn(4, in_features, dtype=dtype)
        expected = linear(x)
        assert torch.equal(DiabloLinear.from_linear(linear, num_blocks=num_blocks)(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("in_features", "out_features", "num_blocks"), SIZES)
def test_merge_equals_reference_and_unmerge_restores(
    kind: str, dtype: torch.dtype, in_features: int, out_features: int, num_blocks: int
) -> None:
    layer = with_random_blocks(base(kind, in_features, out_features, dtype), num_blocks)
    own = layer.weight.detach().clone()
    oriented = own.T if kind == "conv1d" else own
    layer.merge()
    layer.merge()  # once is enough
    merged = layer.weight.T if kind == "conv1d" else layer.weight
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    reference = blockdiag.add_to_weight(oriented.to(wide).numpy(), layer.blocks.detach().numpy())
    assert torch.equal(merged, torch.from_numpy(reference).to(dtype))
    x = torch.randn(3, in_features, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x)), "a merged layer must not add its branch again"
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, own)
    assert not layer.merged


def test_merged_output_equals_branch() -> None:
    layer = with_random_blocks(base("linear", 10, 7), 4)
    x = torch.randn(3, 10)
    branch = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), branch, rtol=0, atol=1e-5)  # float32 sums of ten terms near 1


def test_set_enabled_switches_every_layer() -> None:
    model = nn.Sequential(with_random_blocks(base("linear", 8, 8), 2), with_random_blocks(base("linear", 8, 8), 4))
    x = torch.randn(2, 8)
    on = model(x)
    assert list(diablo_layers(model)) == ["0", "1"]
    set_enabled(model, False)
    off = model(x)
    assert torch.equal(off, model[1].base(model[0].base(x))) and not torch.allclose(on, off)
    set_enabled(model, True)
    assert torch.equal(model(x), on)


def test_only_blocks_are_trainable_and_they_are_wide() -> None:
    layer = DiabloLinear.from_linear(base("linear-bias", 8, 8, torch.bfloat16), num_blocks=2)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["blocks"]
    assert layer.blocks.dtype == torch.float32
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_runs_branch_in_half_with_float32_gradients() -> None:
    layer = with_random_blocks(base("linear", 8, 8), 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 8))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.blocks.grad is not None and layer.blocks.grad.dtype == torch.float32


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(InputError, match="not beside LayerNorm"):
        DiabloLinear.from_linear(nn.LayerNorm(4), num_blocks=2)
    with pytest.raises(InputError, match="num_blocks is 9, but a layer of 4 inputs and 8 outputs takes 1 to 4"):
        DiabloLinear.from_linear(nn.Linear(4, 8), num_blocks=9)
    with pytest.raises(InputError, match=r"cover 2 × 2 = 4 positions, but the module's in_features is 8"):
        DiabloLinear.from_linear(nn.Linear(8, 8), blocks=torch.zeros(2, 2, 4))
    with pytest.raises(InputError, match="blocks have shape"):
        DiabloLinear.from_linear(nn.Linear(8, 8), blocks=torch.zeros(2, 2))
    with pytest.raises(InputError, match="either blocks or num_blocks"):
        DiabloLinear.from_linear(nn.Linear(8, 8))
