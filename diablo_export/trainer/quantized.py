"""A base on the grid that ships: linear layers that keep codes and scales, and dequantize them where they are needed.

The numbers are those of an export, bit for bit: `quantization.quantize` of the checkpoint's weights. No float copy of a
weight outlives a forward or backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from diablo_export.adapter import stored_transposed
from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import progress
from diablo_export.errors import CheckpointError
from diablo_export.quantization import Float32, Quantized, dequantize, zero_points
from diablo_export.trainer.joined import unpack_codes, unpack_weight
from diablo_export.trainer.layer import is_linear


class QuantizedLinear(nn.Module):
    """A frozen linear layer, y = x · Wᵀ + bias, W = (code − zero) · scale.

    Attributes:
        codes: (out, groups, group_size · bits / 8), packed as MatMulNBits has them.
        scales: (out, groups), float32.
        zeros: (out, groups), uint8; None: 2^(bits − 1).
        bias: the float layer's, or None.
        bits: of a code.
        in_features: without what pads the last group.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, stored: Quantized, bias: Tensor | None = None) -> None:
        """Hold `stored` on the CPU; buffers, so that the layer moves with its model."""
        super().__init__()
        self.bits, self.in_features, self.out_features = stored.bits, stored.in_features, len(stored.scales)
        symmetric = stored.zero_points is None
        self.register_buffer("codes", torch.from_numpy(stored.codes), persistent=False)
        self.register_buffer("scales", torch.from_numpy(stored.scales), persistent=False)
        zeros = None if symmetric else torch.from_numpy(np.ascontiguousarray(zero_points(stored)))
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Module, grid: BaseGrid) -> QuantizedLinear:
        """The layer on its grid, on the same device; an nn.Linear or a Conv1D."""
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        return cls(grid.quantize(_oriented(linear)), bias).to(linear.get_parameter("weight").device)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), made anew with each look: float32."""
        return unpack_weight(self.codes, self.scales, self.zeros, self.bits, self.in_features)

    def integers(self) -> Tensor:
        """The codes, one a byte: (out, groups, group_size)."""
        return unpack_codes(self.codes, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product

    def extra_repr(self) -> str:
        """Sizes and bits, in the model's printed form."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.bits} bits"


class _Product(torch.autograd.Function):
    """x · Wᵀ that remembers the packed layer for its backward pass, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def pack_base(network: nn.Module, grid: BaseGrid, leave: Collection[str] = ()) -> int:
    """Replace every linear layer of a network, also those inside DiaBlo layers, by its packed form.

    Args:
        network: its float weights go as their layers are replaced; those that embeddings share stay.
        grid: of all of them.
        leave: module paths that stay float, such as a head that is trained whole.

    Returns:
        What the packed weights take, in bytes.
    """
    total = 0
    for parent, leaf, linear in _linears(network, leave):
        packed = QuantizedLinear.from_linear(linear, grid)
        setattr(parent, leaf, packed)
        total += sum(buffer.nbytes for buffer in (packed.codes, packed.scales, packed.zeros) if buffer is not None)
    return total


@torch.no_grad()
def round_base(network: nn.Module, grid: BaseGrid, leave: Collection[str] = ()) -> None:
    """Round every linear layer's weight to the grid and keep it as floats: the same numbers, for whoever reads them."""
    for _, _, linear in _linears(network, leave):
        old = linear.get_parameter("weight")
        values = dequantize(grid.quantize(_oriented(linear)))
        oriented = torch.from_numpy(np.ascontiguousarray(values.T if isinstance(linear, Conv1D) else values))
        # a parameter of its own: a tied one is the embedding's too, which an export keeps in float
        linear.weight = nn.Parameter(oriented.to(old.device, old.dtype), requires_grad=False)


def float_weight(checkpoint: Checkpoint, module: str) -> Float32:
    """A module's weight as the checkpoint stores it, (out_features, in_features), float32.

    Raises:
        CheckpointError: there is none.
    """
    info = checkpoint.find(f"{module}.weight")
    if info is None:
        raise CheckpointError(f"{checkpoint.folder}: has no weight for {module}")
    weight = info.read().astype(np.float32)
    return weight.T if stored_transposed(checkpoint.config) else weight


def _linears(network: nn.Module, leave: Collection[str]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each linear layer that an export quantizes, and where it hangs."""
    found = [name for name, module in network.named_modules() if is_linear(module) and name not in leave]
    with progress("quantizing", len(found)) as advance:
        for name in found:
            parent, _, leaf = name.rpartition(".")
            owner = network.get_submodule(parent)
            yield owner, leaf, owner.get_submodule(leaf)
            advance(1)


def _oriented(linear: nn.Module) -> Float32:
    """A linear layer's weight, (out, in), float32."""
    weight = linear.get_parameter("weight").detach().float().cpu()
    return np.ascontiguousarray((weight.T if isinstance(linear, Conv1D) else weight).numpy())
