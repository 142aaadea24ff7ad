"""The linear layer and its blocks as one operator: numbers, gradients, autocast, checkpointing, torch.compile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diablo_export.blockdiag import BlockShape
from diablo_export.quantization import dequantize, quantize
from diablo_export.trainer import joined
from diablo_export.trainer.layer import DiabloLinear, add_branch
from diablo_export.trainer.packed_layer import QuantizedLinear
from tests.test_layer import SIZES

LEADING: list[tuple[int, ...]] = [(), (3,), (2, 3), (2, 0)]


def case(sizes: tuple[int, int, int], lead: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float64) -> Any:
    """x, weight, bias, blocks and their shape; x and blocks want gradients."""
    torch.manual_seed(0)
    shape = BlockShape.for_linear(*sizes)
    x = torch.randn(*lead, sizes[0], dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(sizes[1], sizes[0], dtype=dtype), torch.randn(sizes[1], dtype=dtype)
    return x, weight, bias, torch.randn(shape.blocks, dtype=dtype, requires_grad=True), shape


def by_parts(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, shape: BlockShape) -> Tensor:
    """The layer and the branch as operators of their own."""
    return add_branch(nn.functional.linear(x, weight, bias), x, blocks, shape)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lead", LEADING)
def test_output_and_gradients_are_those_of_the_parts(sizes: tuple[int, int, int], lead: tuple[int, ...]) -> None:
    x, weight, bias, blocks, shape = case(sizes, lead)
    got, wanted = joined.linear(x, weight, bias, blocks), by_parts(x, weight, bias, blocks, shape)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)  # float64 sums of at most 64 terms, in another order
    direction = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(got, (x, blocks), direction),
        torch.autograd.grad(wanted, (x, blocks), direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(12, 8, 4), (10, 7, 4)])
def test_the_operators_hold_torchs_own_checks(sizes: tuple[int, int, int]) -> None:
    x, weight, bias, blocks, _ = case(sizes, (3,))
    assert torch.autograd.gradcheck(lambda x, d: joined.linear(x, weight, bias, d), (x, blocks))
    for operator, inputs in (
        (joined._linear, (x, weight, bias, blocks)),
        (joined._linear_input_gradient, (torch.randn(3, sizes[1], dtype=x.dtype), weight, blocks.detach())),
        (joined._block_gradient, (x.detach(), torch.randn(3, sizes[1], dtype=x.dtype), blocks.detach())),
    ):
        torch.library.opcheck(operator, inputs)


def test_frozen_inputs_cost_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, blocks, _ = case((12, 8, 4))
    monkeypatch.setattr(joined, "_linear_input_gradient", None)  # would be called
    joined.linear(x.detach(), weight, None, blocks).sum().backward()
    assert blocks.grad is not None and x.grad is None


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_layer_that_is_trained_itself_gets_its_gradient(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "DEVICES", ("cpu",))
    layer = DiabloLinear.from_linear(nn.Linear(12, 8), num_blocks=4)
    parameter = layer.base.get_parameter(trained).requires_grad_(True)
    layer(torch.randn(3, 12)).sum().backward()
    assert parameter.grad is not None


def test_a_backward_pass_under_autocast_takes_the_dtypes_of_the_forward() -> None:
    x, weight, _, blocks, _ = case((10, 7, 4), dtype=torch.float32)
    wanted = torch.autograd.grad(joined.linear(x, weight, None, blocks).sum(), (x, blocks))
    loss = joined.linear(x, weight, None, blocks).sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, (x, blocks))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_its_float32_value_rounded_once(
    bits: int, symmetric: bool, stored: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 256, (6, 3, 16 * bits // 8), dtype=torch.uint8)
    scales, zeros = torch.randn(6, 3).to(stored), torch.randint(0, 2**bits, (6, 3), dtype=torch.uint8)
    kept = codes.clone()
    got = joined.unpack_weight(codes, scales, None if symmetric else zeros, bits, 45, dtype)
    shifted = [codes >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    zero = 2 ** (bits - 1) if symmetric else zeros[..., None].float()
    wanted = (torch.stack(shifted, -1).flatten(-2).float() - zero) * scales[..., None].float()
    assert got.dtype == dtype and torch.equal(got, wanted.flatten(1)[:, :45].to(dtype))
    assert torch.equal(codes, kept)  # in 8 bits they are not copied to be unpacked


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_is_the_layer_on_its_grid(bits: int, symmetric: bool) -> None:
    stored = quantize(np.random.default_rng(0).normal(size=(24, 40)).astype(np.float32), bits, 16, symmetric)
    layer = QuantizedLinear(stored, torch.randn(24))
    weight = torch.from_numpy(dequantize(stored))
    assert torch.equal(joined.unpack_weight(layer.codes, layer.scales, layer.zeros, bits, 40), weight)
    shape = BlockShape.for_linear(40, 24, 4)
    x, blocks = torch.randn(5, 40, requires_grad=True), torch.randn(shape.blocks, requires_grad=True)
    got = joined.packed_linear(x, layer.codes, layer.scales, layer.zeros, layer.bias, blocks, bits)
    wanted = joined.linear(x, weight, layer.bias, blocks)
    assert torch.equal(got, wanted)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, blocks)), torch.autograd.grad(wanted.sum(), (x, blocks)), strict=True
    ):
        assert torch.equal(a, b)
    inputs = (x, layer.codes, layer.scales, layer.zeros, layer.bias, blocks, bits)
    torch.library.opcheck(joined._packed_linear, inputs, test_utils=("test_schema", "test_faketensor"))


def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs() -> None:
    x, weight, bias, blocks, shape = case((12, 8, 4), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = joined.linear(x, weight, bias, blocks), by_parts(x, weight, bias, blocks, shape)
    assert got.dtype == wanted.dtype == torch.bfloat16
    # the parts round the sum to bfloat16 three times, this once or twice: 2⁻⁸ of numbers up to 16, each
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.2)
    got.float().sum().backward()
    assert x.grad.dtype == blocks.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    x, weight, bias, blocks, _ = case((10, 7, 4))
    wanted = torch.autograd.grad(joined.linear(x, weight, bias, blocks).square().sum(), (x, blocks))
    y: Any = checkpoint(joined.linear, x, weight, bias, blocks, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, wanted[0]) and torch.equal(blocks.grad, wanted[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend: str) -> None:
    x, weight, bias, blocks, _ = case((10, 7, 4))
    compiled = torch.compile(joined.linear, backend=backend, fullgraph=True)
    got, wanted = compiled(x, weight, bias, blocks), joined.linear(x, weight, bias, blocks)
    assert torch.equal(got, wanted)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, blocks)), torch.autograd.grad(wanted.sum(), (x, blocks)), strict=True
    ):
        assert torch.equal(a, b)


def test_nothing_of_ys_size_is_made_but_y() -> None:
    """By torch's own count: y and its like are the only large tensors, forward and backward."""
    x, weight, _, blocks, _ = case((256, 512, 4), (64,), torch.float32)
    made: list[int] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                made.append(out.numel())
            return out

    with torch.no_grad(), Count():
        y = joined._joined(x, weight, None, blocks)
        joined._input_gradient(y, weight, blocks)
    assert sorted(made) == [64 * 256, 64 * 512]


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_takes_it_on_its_devices(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    layer = DiabloLinear.from_linear(nn.Linear(32, 12), num_blocks=4)
    nn.init.normal_(layer.blocks)
    if packed:
        layer.base = QuantizedLinear(quantize(layer.weight.numpy(), 4, 16), layer.bias)
    x = torch.randn(2, 3, 32)
    apart = layer(x)
    monkeypatch.setattr(joined, "DEVICES", ("cpu",))
    calls: list[int] = []
    monkeypatch.setattr(layer.base, "forward", lambda x: calls.append(1))
    torch.testing.assert_close(layer(x), apart, rtol=0, atol=1e-5)  # float32 sums of 40 terms near 1
    layer(x).sum().backward()
    assert layer.blocks.grad is not None and not calls
    layer.base.register_forward_hook(lambda *_: None)
    assert joined.beside(layer.base, x, layer.blocks) is None  # somebody wants to see the base's own output
    assert joined.beside(nn.Identity(), x, layer.blocks) is None
