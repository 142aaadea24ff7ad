"""Blocks folded into their base weight while they are trained: y = x · (W + blockdiag(D)) in one matrix product.

Only the entries under the blocks are written, once after each step of the optimizer, in place; what the base had there
is kept. Forward and backward then cost what the frozen base's do, but for the blocks' own gradient, which is the
diagonal of the weight's: D_n ← X_nᵀ · G_n. In 32 bits and more the sum loses nothing that matters; in 16 bits small
updates would vanish, and the blocks stay a branch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from diablo_export.blockdiag import BlockShape

if TYPE_CHECKING:
    from diablo_export.trainer.layer import DiabloLinear


def fold_blocks(layers: Iterable[DiabloLinear]) -> None:
    """Fold the blocks of each layer whose base holds a plain weight of the blocks' own type."""
    for layer in layers:
        base = layer.base
        if type(base) in (nn.Linear, Conv1D) and not layer.merged:
            weight = base.get_parameter("weight")
            if weight.dtype == layer.blocks.dtype and weight.is_contiguous():
                layer.fold = Fold(base, layer.shape)


class Fold:
    """One layer's base weight, with or without the blocks in it.

    Attributes:
        weight: the base's own, (out, in), or (in, out) of a Conv1D.
        own: what the base has under the blocks.
    """

    def __init__(self, base: nn.Module, shape: BlockShape) -> None:
        self.weight, self.bias, self.shape = base.get_parameter("weight"), base.bias, shape
        self.transposed = isinstance(base, Conv1D)
        self._places = _places(self.weight.detach(), shape, self.transposed)
        self.own = [place.clone() for _, place in self._places]
        self._holds: tuple[int, int] | None = None  # which values of the blocks the weight holds

    def __call__(self, x: Tensor, blocks: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        self.hold(blocks)
        weight = self.weight.T if self.transposed else self.weight
        y: Tensor = _FoldedLinear.apply(x, weight, self.bias, blocks, self.shape)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def hold(self, blocks: Tensor) -> None:
        """Have the weight hold these blocks, as they are now."""
        version = blocks.data_ptr(), blocks._version  # every change in place counts the version up
        if version != self._holds:
            for (part, place), own in zip(self._places, self.own, strict=True):
                torch.add(own, blocks[part], out=place)
            self._holds = version

    @torch.no_grad()
    def lift(self) -> None:
        """Put the base's own values back, bit for bit; the next call folds again."""
        if self._holds is not None:
            for (_, place), own in zip(self._places, self.own, strict=True):
                place.copy_(own)
            self._holds = None


class _FoldedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, shape: BlockShape) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_blocks = None
        if ctx.needs_input_grad[3]:
            inputs = _cut(x, ctx.shape.num_blocks, ctx.shape.block_size_in)
            outputs = _cut(gradient, ctx.shape.num_blocks, ctx.shape.block_size_out)
            of_blocks = torch.bmm(inputs.permute(1, 2, 0), outputs.transpose(0, 1))
        return of_x, None, None, of_blocks, None


def _cut(x: Tensor, count: int, size: int) -> Tensor:
    """(…, features) → (tokens, count, size), with zeros past the last feature."""
    missing = count * size - x.shape[-1]
    return (functional.pad(x, (0, missing)) if missing else x).reshape(-1, count, size)


def _places(weight: Tensor, shape: BlockShape, transposed: bool) -> list[tuple[Any, Tensor]]:
    """Parts of the blocks, (…, in, out), and a view of the weight's entries under each: one for all where they fit."""
    n, i, o = shape.num_blocks, shape.block_size_in, shape.block_size_out
    if (n * i, n * o) == (shape.in_features, shape.out_features):
        if transposed:  # (in, out) → (i, o, n) on the diagonal → (n, i, o)
            return [(slice(None), weight.view(n, i, n, o).diagonal(dim1=0, dim2=2).permute(2, 0, 1))]
        return [(slice(None), weight.view(n, o, n, i).diagonal(dim1=0, dim2=2).permute(2, 1, 0))]
    whole = weight if transposed else weight.T
    return [
        ((k, slice(rows.stop - rows.start), slice(columns.stop - columns.start)), whole[rows, columns])
        for k, (rows, columns) in enumerate(shape.slices())
    ]
