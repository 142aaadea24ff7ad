"""Linear layers that keep a weight packed and dequantize it where they are needed: forward, and backward again.

Codes on a grid, as an export and as GPTQ, AWQ and compressed-tensors have them; and codes that are looked up in a
table, as bitsandbytes has them. No float copy of a weight outlives a forward or backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from diablo_export.base_grid import BaseGrid
from diablo_export.packed.bnb import LookedUp
from diablo_export.packed.grid import PackedGrid
from diablo_export.quantization import Float32, Quantized, pack, zero_points
from diablo_export.trainer.joined import unpack_codes, unpack_weight


class QuantizedLinear(nn.Module):
    """A frozen linear layer, y = x · Wᵀ + bias, W = (code − zero) · scale.

    Attributes:
        codes: (out, groups, group_size · bits / 8), packed as MatMulNBits has them.
        scales: (out, groups), float32.
        zeros: (out, groups), uint8; None: 2^(bits − 1).
        bias: the float layer's, or None.
        order: (in_features,), where each input lies among the codes; None: in order. GPTQ's activation order puts
            inputs of one scale together that lie apart.
        bits: of a code.
        in_features: without what pads groups.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    order: Tensor | None

    def __init__(self, stored: Quantized, bias: Tensor | None = None, order: Tensor | None = None) -> None:
        """Hold `stored` on the CPU; buffers, so that the layer moves with its model."""
        super().__init__()
        self.bits, self.out_features = stored.bits, len(stored.scales)
        self.in_features = stored.in_features if order is None else len(order)
        symmetric = stored.zero_points is None
        self.register_buffer("codes", torch.from_numpy(stored.codes), persistent=False)
        self.register_buffer("scales", torch.from_numpy(stored.scales), persistent=False)
        zeros = None if symmetric else torch.from_numpy(np.ascontiguousarray(zero_points(stored)))
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.register_buffer("order", order, persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Module, grid: BaseGrid) -> QuantizedLinear:
        """The layer on its grid, on the same device; an nn.Linear or a Conv1D."""
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        return cls(grid.quantize(oriented(linear)), bias).to(linear.get_parameter("weight").device)

    @classmethod
    def from_grid(cls, grid: PackedGrid, bias: Tensor | None = None) -> QuantizedLinear:
        """The layer of a quantized checkpoint's codes; scales keep the dtype that they are stored in."""
        inputs, members = grid.shape[1], grid.members()  # (groups, size)
        members = np.pad(members, ((0, 0), (0, -members.shape[1] % (8 // grid.bits))), constant_values=inputs)
        places = members.reshape(-1)
        in_order = bool((places[:inputs] == np.arange(inputs)).all())
        codes = pack(np.pad(grid.codes, ((0, 0), (0, 1)))[:, members], grid.bits)
        middle = 2 ** (grid.bits - 1)
        zeros = None if (grid.zeros == middle).all() else pack(grid.zeros, grid.bits, fill=middle)
        stored = Quantized(
            codes, grid.scales, zeros, grid.bits, members.shape[1], inputs if in_order else members.size
        )  # fmt: skip
        order = None if in_order else torch.from_numpy(np.argsort(places, kind="stable")[:inputs])
        layer = cls(stored, bias, order)
        layer.scales = layer.scales.to(getattr(torch, np.dtype(grid.dtype).name))
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), made anew with each look: float32."""
        if self.order is None:
            return unpack_weight(self.codes, self.scales, self.zeros, self.bits, self.in_features)
        size = self.codes.shape[-1] * 8 // self.bits
        weight = unpack_weight(self.codes, self.scales, self.zeros, self.bits, self.codes.shape[1] * size)
        return weight.index_select(1, self.order)

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


class LookedUpLinear(nn.Module):
    """A frozen linear layer whose codes are looked up, y = x · Wᵀ + bias, W = table[code] · scale: nf4 and fp4.

    Attributes:
        codes: (groups · size / 2,), two a byte, low bits first, of the flat weight.
        pairs: (256, 2), what the two codes of each byte are worth.
        absmax: (groups,), scales as they are stored: float32, or with double quantization uint8 codes.
        absmax_table: (256,), what those are worth; None without double quantization.
        absmax_scales: (⌈groups / size⌉,), their scales, or None.
        bias: the float layer's, or None.
    """

    codes: Tensor
    pairs: Tensor
    absmax: Tensor
    absmax_table: Tensor | None
    absmax_scales: Tensor | None
    bias: Tensor | None

    def __init__(self, looked: LookedUp, bias: Tensor | None = None) -> None:
        """Hold `looked` on the CPU; buffers, so that the layer moves with its model."""
        super().__init__()
        self.out_features, self.in_features = looked.shape
        self._groups, self._nested, self._offset = len(looked.codes), looked.absmax.size, looked.absmax.offset
        table = torch.tensor(looked.table)
        pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1)
        buffers = {
            "codes": torch.from_numpy(pack(looked.codes.reshape(-1), 4)), "pairs": pairs,
            "absmax": torch.tensor(looked.absmax.stored), "absmax_table": _tensor(looked.absmax.table),
            "absmax_scales": _tensor(looked.absmax.scales), "bias": None if bias is None else bias.detach(),
        }  # fmt: skip
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), made anew with each look: float32."""
        values = self.pairs.index_select(0, self.codes.int()).view(self._groups, -1)  # (groups, size)
        values *= self._scales()[:, None]
        return values.flatten()[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def _scales(self) -> Tensor:
        if self.absmax_table is None or self.absmax_scales is None:
            return self.absmax
        steps = self.absmax_scales.repeat_interleave(self._nested)[: self._groups]
        return self.absmax_table.index_select(0, self.absmax.int()) * steps + self._offset

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product

    def extra_repr(self) -> str:
        """Sizes, in the model's printed form."""
        return f"in_features={self.in_features}, out_features={self.out_features}, 4 bits, looked up"


PackedLinear = QuantizedLinear | LookedUpLinear


def from_stored(stored: PackedGrid | LookedUp, bias: Tensor | None = None) -> PackedLinear:
    """The layer of a weight that a quantized checkpoint holds."""
    return LookedUpLinear(stored, bias) if isinstance(stored, LookedUp) else QuantizedLinear.from_grid(stored, bias)


def holds_packed(network: nn.Module) -> bool:
    """Whether any layer of a network keeps its weight packed."""
    return any(isinstance(module, QuantizedLinear | LookedUpLinear) for module in network.modules())


class _Product(torch.autograd.Function):
    """x · Wᵀ that remembers the packed layer for its backward pass, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def oriented(linear: nn.Module) -> Float32:
    """A linear layer's weight, (out, in), float32."""
    weight = linear.get_parameter("weight").detach().float().cpu()
    return np.ascontiguousarray((weight.T if isinstance(linear, Conv1D) else weight).numpy())


def _tensor(values: Float32 | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)
