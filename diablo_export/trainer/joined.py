"""A frozen linear layer and its blocks as one torch operator: y = x · Wᵀ + bias + x · blockdiag(D).

The branch is added where the layer's product lies, block by block in one strided batched product, and so is its part of
the gradient of x. Beside the layer itself that reads x and y once and writes y once; as operators of their own the
branch and the sum read and write y four times and hold a second one. Nothing is padded and nothing copied.

`diablo::linear` is for float weights, `diablo::packed_linear` for codes that are dequantized where they are needed, in
the backward pass again: no float copy of a weight is kept. Both are custom operators (torch.library), opaque to
torch.compile, with plain torch inside, so that they run on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DEVICES = ("cuda",)  # elsewhere a sum more costs less than a product whose rows lie apart


def beside(base: nn.Module, x: Tensor, blocks: Tensor) -> Tensor | None:
    """base(x) + x · blockdiag(blocks) as one operator; None where the two are to be computed one after the other.

    That is on other devices, beside layers that are neither nn.Linear nor packed, that are trained themselves, or whose
    own call somebody watches.
    """
    if x.device.type not in DEVICES or base._forward_hooks or base._forward_pre_hooks:
        return None
    bias = getattr(base, "bias", None)
    if isinstance(bias, Tensor) and bias.requires_grad:
        return None
    if type(base) is nn.Linear and not base.weight.requires_grad:
        return linear(x, base.weight, bias, blocks)
    codes, scales, zeros, bits = (getattr(base, name, None) for name in ("codes", "scales", "zeros", "bits"))
    in_order = getattr(base, "order", None) is None  # else the base's own product puts the inputs right
    if in_order and isinstance(codes, Tensor) and isinstance(scales, Tensor) and isinstance(bits, int):
        return packed_linear(x, codes, scales, zeros, bias, blocks, bits)
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    """x · weightᵀ + bias + x · blockdiag(blocks), in x's dtype or, under autocast, in its own.

    Args:
        x: (…, in_features).
        weight: (out_features, in_features), frozen, of any strides; it gets no gradient.
        bias: (out_features), frozen, or None.
        blocks: (num_blocks, block_size_in, block_size_out), in any float dtype; its gradient has the same.
    """
    x, dtype = _under_autocast(x)
    y: Tensor = _linear(x, weight.to(dtype), None if bias is None else bias.to(dtype), blocks)
    return y


def packed_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, blocks: Tensor, bits: int
) -> Tensor:
    """The same beside a weight that `unpack_weight` makes of codes, scales and zeros."""
    x, dtype = _under_autocast(x)
    y: Tensor = _packed_linear(x, codes, scales, zeros, None if bias is None else bias.to(dtype), blocks, bits)
    return y


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed codes (out, groups, group_size · bits / 8), low bits first, one a byte: (out, groups, group_size)."""
    if bits == 8:
        return codes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    integers: Tensor = (codes[..., None] >> shifts).bitwise_and_(2**bits - 1)
    return integers.flatten(-2)


def unpack_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight (out_features, in_features) that packed codes stand for: (code − zero) · scale.

    It is that number in float32, rounded once to `dtype`; no float32 copy of it is made on the way, as codes less their
    zero points are whole numbers: each training step reads and writes every weight, so a pass over bytes counts.

    Args:
        codes: (out, groups, group_size · bits / 8), low bits first.
        scales: (out, groups).
        zeros: (out, groups), uint8; None: 2^(bits − 1).
        bits: of a code: 2, 4 or 8.
        in_features: without what pads the last group.
        dtype: a float one.
    """
    integers = unpack_codes(codes, bits)
    wide = torch.int16 if bits == 8 else torch.int8  # what a difference of two of them fits into
    integers = integers.to(wide) if bits == 8 else integers.view(wide)
    integers -= 2 ** (bits - 1) if zeros is None else zeros[..., None].to(wide)
    values = torch.empty(integers.shape, dtype=dtype, device=codes.device)
    torch.mul(integers, scales[..., None].float(), out=values)
    return values.flatten(1)[:, :in_features]


def _under_autocast(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """x as the products take it, and the dtype that they compute in."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype
    return x.to(dtype), dtype


def _as_they_are(x: Tensor) -> torch.autocast:
    """Products in the dtypes that they were given, also where autocast is on around a backward pass."""
    return torch.autocast(x.device.type, enabled=False)


def _rows(x: Tensor) -> Tensor:
    """(…, features) → (tokens, features), contiguous: the views below need that."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _whole(x: Tensor, count: int, size: int) -> Tensor:
    """The first `count` runs of `size` columns, as a view (count, tokens, size)."""
    return x[:, : count * size].view(len(x), count, size).transpose(0, 1)


def _cut(x: Tensor, block: int, size: int) -> Tensor:
    """The columns of one block, fewer at the end, as a view (tokens, ≤ size)."""
    return x[:, min(block * size, x.shape[1]) : (block + 1) * size]


def _add_products(y: Tensor, x: Tensor, blocks: Tensor) -> None:
    """y += x · blockdiag(blocks), in place: y (tokens, out), x (tokens, in), both contiguous."""
    count, size_in, size_out = blocks.shape
    whole = min(count, x.shape[1] // size_in, y.shape[1] // size_out)
    if whole:
        _whole(y, whole, size_out).baddbmm_(_whole(x, whole, size_in), blocks[:whole])
    for block in range(whole, count):  # cropped at the tail: one, as a rule
        to, inputs = _cut(y, block, size_out), _cut(x, block, size_in)
        if to.numel() and inputs.numel():
            to.addmm_(inputs, blocks[block, : inputs.shape[1], : to.shape[1]])


def _input_gradient(gradient: Tensor, weight: Tensor, blocks: Tensor) -> Tensor:
    """gradient · W + gradient · blockdiag(D)ᵀ: (…, out) → (…, in)."""
    rows = _rows(gradient)
    with _as_they_are(rows):
        dx = rows @ weight
        _add_products(dx, rows, blocks.to(dx.dtype).mT)
    return dx.view(*gradient.shape[:-1], weight.shape[1])


def _joined(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    rows = _rows(x)
    y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    _add_products(y, rows, blocks.to(y.dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("diablo::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    return _joined(x, weight, bias, blocks)


@torch.library.custom_op("diablo::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, blocks: Tensor, bits: int
) -> Tensor:
    return _joined(x, unpack_weight(codes, scales, zeros, bits, x.shape[-1], x.dtype), bias, blocks)


@torch.library.custom_op("diablo::linear_input_gradient", mutates_args=())
def _linear_input_gradient(gradient: Tensor, weight: Tensor, blocks: Tensor) -> Tensor:
    return _input_gradient(gradient, weight, blocks)


@torch.library.custom_op("diablo::packed_input_gradient", mutates_args=())
def _packed_input_gradient(
    gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, blocks: Tensor, bits: int, in_features: int
) -> Tensor:
    weight = unpack_weight(codes, scales, zeros, bits, in_features, gradient.dtype)
    return _input_gradient(gradient, weight, blocks)


@torch.library.custom_op("diablo::block_gradient", mutates_args=())
def _block_gradient(x: Tensor, gradient: Tensor, blocks: Tensor) -> Tensor:
    """The blocks' share of xᵀ · gradient, shaped and typed as `blocks`; 0 in padding."""
    count, size_in, size_out = blocks.shape
    x, gradient = _rows(x), _rows(gradient)
    whole = min(count, x.shape[1] // size_in, gradient.shape[1] // size_out)
    with _as_they_are(x):
        products = torch.bmm(_whole(x, whole, size_in).mT, _whole(gradient, whole, size_out)).to(blocks.dtype)
    if whole == count:
        return products
    found = torch.zeros_like(blocks, memory_format=torch.contiguous_format)
    found[:whole] = products
    for block in range(whole, count):
        inputs, outputs = _cut(x, block, size_in), _cut(gradient, block, size_out)
        with _as_they_are(x):
            found[block, : inputs.shape[1], : outputs.shape[1]] = inputs.T @ outputs
    return found


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_packed_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, blocks: Tensor, bits: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_linear_input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, blocks: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], weight.shape[1])


@_packed_input_gradient.register_fake
def _(
    gradient: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, blocks: Tensor, bits: int, in_features: int
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


@_block_gradient.register_fake
def _(x: Tensor, gradient: Tensor, blocks: Tensor) -> Tensor:
    return torch.empty_like(blocks, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor) or value is None))
    ctx.bits = next((value for value in inputs if isinstance(value, int)), 0)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _, blocks = ctx.saved_tensors
    dx = _linear_input_gradient(gradient, weight, blocks) if ctx.needs_input_grad[0] else None
    return dx, None, None, _block_gradient(x, gradient, blocks) if ctx.needs_input_grad[3] else None


def _packed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scales, zeros, _, blocks = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _packed_input_gradient(gradient, codes, scales, zeros, blocks, ctx.bits, x.shape[-1])
    return dx, None, None, None, None, _block_gradient(x, gradient, blocks) if ctx.needs_input_grad[5] else None, None


_linear.register_autograd(_linear_backward, setup_context=_keep)
_packed_linear.register_autograd(_packed_backward, setup_context=_keep)
