"""The DiaBlo layer in torch: a frozen linear layer plus trainable diagonal blocks, y = base(x) + x · blockdiag(D).

The same maths as `diablo_export.blockdiag`, which is its reference. One batched matrix product computes the
branch; blockdiag(D) is never built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from diablo_export.blockdiag import BlockShape
from diablo_export.errors import InputError
from diablo_export.trainer.folding import Fold
from diablo_export.trainer.joined import beside
from diablo_export.trainer.packed_layer import LookedUpLinear, QuantizedLinear


class DiabloLinear(nn.Module):
    """A frozen linear layer with diagonal blocks beside it.

    Attributes:
        base: the wrapped nn.Linear or Conv1D, frozen, or a packed layer.
        blocks: (num_blocks, block_size_in, block_size_out), float32 (float64 beside a float64 base).
        shape: the sizes of the layer and of its blocks.
        enabled: False gives the base alone.
        merged: whether the base weight holds the blocks at the moment.
        fold: adds the blocks to the base weight while they are trained, see `folding`; None: they are a branch.
    """

    def __init__(self, base: nn.Module, blocks: Tensor, shape: BlockShape) -> None:
        super().__init__()
        self.base = base
        self.blocks = nn.Parameter(blocks)
        self.shape = shape
        self.enabled = True
        self.fold: Fold | None = None
        self._replaced: list[Tensor] | None = None  # the base's own values under each block, while merged

    @classmethod
    def from_linear(
        cls, linear: nn.Module, blocks: Tensor | None = None, num_blocks: int | None = None
    ) -> DiabloLinear:
        """Wrap `linear`, freezing it, with the given blocks or with `num_blocks` zero blocks.

        Args:
            linear: an nn.Linear, weight (out, in), transformers' Conv1D, weight (in, out), or a packed layer.
            blocks: (num_blocks, block_size_in, block_size_out).
            num_blocks: how many zero blocks to make, when `blocks` is None.

        Raises:
            InputError: another kind of layer, or blocks that do not fit it.
        """
        in_features, out_features = features(linear)
        if blocks is None:
            if num_blocks is None:
                raise InputError("give either blocks or num_blocks")
            shape = BlockShape.for_linear(in_features, out_features, num_blocks)
            blocks = torch.zeros(shape.blocks)
        elif blocks.ndim != 3:
            raise InputError(
                f"blocks have shape {tuple(blocks.shape)}; they must be (num_blocks, block_size_in, block_size_out)"
            )
        else:
            shape = BlockShape(in_features, out_features, *blocks.shape)
        linear.requires_grad_(False)
        if isinstance(linear, QuantizedLinear | LookedUpLinear):
            device, dtype = linear.codes.device, torch.float32
        else:
            weight = linear.get_parameter("weight")
            device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)  # 16 bits lose updates
        return cls(linear, blocks.detach().to(device, dtype, copy=True), shape)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at their layers' weights."""
        weight = self.base.weight  # a packed base makes it anew
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the blocks at the moment."""
        return self._replaced is not None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        if self.fold is not None:
            if self.enabled:
                return self.fold(x, self.blocks)
            self.fold.lift()
        active = self.enabled and not self.merged
        if active and (joined := beside(self.base, x, self.blocks)) is not None:
            return joined
        y: Tensor = self.base(x)
        return add_branch(y, x, self.blocks, self.shape) if active else y

    @torch.no_grad()
    def merge(self) -> None:
        """Add the blocks to the base weight, rounded once to its dtype; only the entries that they meet change."""
        if self.merged:
            return
        if self.fold is not None:
            self.fold.lift()
            self.fold = None
        self._replaced = []
        for entries, block in self._touched():
            self._replaced.append(entries.clone())
            entries.copy_(entries.to(block.dtype) + block)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own values back, bit for bit."""
        for (entries, _), own in zip(self._touched(), self._replaced or (), strict=False):
            entries.copy_(own)
        self._replaced = None

    def _touched(self) -> list[tuple[Tensor, Tensor]]:
        return touched(self.base, self.blocks, self.shape)

    def extra_repr(self) -> str:
        """The blocks' shape, in the model's printed form."""
        return "blocks={}×{}×{}".format(*self.shape.blocks)


def add_branch(y: Tensor, x: Tensor, blocks: Tensor, shape: BlockShape) -> Tensor:
    """y + x · blockdiag(blocks): y (…, out_features), x (…, in_features)."""
    padding = shape.num_blocks * shape.block_size_in - shape.in_features
    if padding:
        x = functional.pad(x, (0, padding))
    x = x.reshape(-1, shape.num_blocks, shape.block_size_in).transpose(0, 1)  # (num_blocks, tokens, block_size_in)
    branch = torch.bmm(x, blocks.to(x.dtype)).transpose(0, 1)  # (tokens, num_blocks, block_size_out)
    if shape.num_blocks * shape.block_size_out == shape.out_features:
        return (y.view(branch.shape) + branch).view(y.shape)  # in place it would copy more, in the backward pass
    return y + branch.flatten(1)[:, : shape.out_features].reshape(y.shape)


def touched(linear: nn.Module, blocks: Tensor, shape: BlockShape) -> list[tuple[Tensor, Tensor]]:
    """Per block, the entries of the layer's weight that it meets, as a view (in, out), and its share of the sum."""
    stored = linear.get_parameter("weight")
    weight: Tensor = stored if isinstance(linear, Conv1D) else stored.T  # (in, out)
    return [
        (weight[i, o], blocks[n, : i.stop - i.start, : o.stop - o.start]) for n, (i, o) in enumerate(shape.slices())
    ]


def features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a layer that blocks can be put beside.

    Raises:
        InputError: another kind of layer.
    """
    if isinstance(linear, QuantizedLinear | LookedUpLinear):
        return linear.in_features, linear.out_features
    if not is_linear(linear):
        kind = type(linear).__name__
        raise InputError(f"blocks go beside nn.Linear and Conv1D layers with float weights, not beside {kind}")
    rows, columns = linear.get_parameter("weight").shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def takes_blocks(module: nn.Module) -> bool:
    """Whether blocks can be put beside `module`: a linear layer, float or packed."""
    return isinstance(module, QuantizedLinear | LookedUpLinear) or is_linear(module)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer with a float weight."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    return module.weight.ndim == 2 and module.weight.is_floating_point()  # not a packed 4-bit weight


def diablo_layers(model: nn.Module) -> dict[str, DiabloLinear]:
    """The DiaBlo layers of a model by module path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DiabloLinear)}


def set_enabled(model: nn.Module, on: bool) -> None:
    """Switch every branch of a model on, or off to get the base."""
    for layer in diablo_layers(model).values():
        layer.enabled = on
