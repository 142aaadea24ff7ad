"""The layer that PEFT puts around a linear layer: y = base(x) + x · blockdiag(D), for any number of adapters.

The maths is that of `diablo_export.trainer.layer`. The base may be quantized by any library: only its forward is
used, and merging is refused.
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo_export.blockdiag import Array, BlockShape
from diablo_export.peft.config import DiabloPeftError
from diablo_export.trainer.layer import add_branch, is_linear, touched

BASE = "__base__"  # PEFT's name for no adapter, in mixed batches
_MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The names that libraries give to the sizes of their linear layers.
_SIZE_NAMES = (("in_features", "out_features"), ("infeatures", "outfeatures"))

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


class Blocks(nn.Module):
    """One adapter's blocks, as the `weight` of a module of their own.

    Their parameter is then named `diablo_blocks.<adapter>.weight`, like those of PEFT's own methods: TRL copies an
    adapter, as the reference of DPO, by looking for `.<adapter>.` within parameter names.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self, y: Tensor, x: Tensor, shape: BlockShape) -> Tensor:
        """y + x · blockdiag(weight); a module of its own, as FSDP may wrap it and gathers weights when it is called."""
        return add_branch(y, x, self.weight, shape).to(y.dtype)


class DiabloLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer with the diagonal blocks of several adapters beside it.

    Attributes:
        base_layer: the wrapped layer.
        diablo_blocks: by adapter, its `weight` (num_blocks, block_size_in, block_size_out).
        diablo_shapes: by adapter, the sizes of the layer and of its blocks.
    """

    adapter_layer_names = ("diablo_blocks",)
    other_param_names = ("diablo_shapes",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        sizes = linear_sizes(base_layer)
        assert sizes is not None  # the tuner asked `linear_sizes` before
        self.in_features, self.out_features = sizes
        self.diablo_blocks = nn.ModuleDict()
        self.diablo_shapes: dict[str, BlockShape] = {}
        self.merged_adapters: list[str] = []
        self._replaced: list[list[Tensor]] = []  # per merged adapter, the weight's own values under each block
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def add_adapter(self, adapter_name: str, shape: BlockShape, zeros: bool = True, frozen: bool = False) -> None:
        """Give the layer blocks of the given shape, zero or (for tests) random, in the base's dtype and place."""
        blocks = torch.zeros(shape.blocks) if zeros else torch.randn(shape.blocks) * 0.1
        self.diablo_blocks[adapter_name] = Blocks(blocks)
        self.diablo_shapes[adapter_name] = shape
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=frozen)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """(…, in_features) → (…, out_features); `adapter_names` gives each row of the batch its own adapter."""
        if adapter_names is not None:
            self._check_mixed(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if adapter_names is not None:
            return self._mixed(y, x, adapter_names)
        for name in self.active_adapters:
            if name in self.diablo_blocks:
                y = self._add(y, x, name)
        return y

    def blocks(self, adapter_name: str) -> Tensor:
        """An adapter's blocks, (num_blocks, block_size_in, block_size_out)."""
        weight: Tensor = self.diablo_blocks[adapter_name].weight  # type: ignore[assignment]
        return weight

    def _add(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        added: Tensor = self.diablo_blocks[name](y, x, self.diablo_shapes[name])
        return added

    def _mixed(self, y: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        y = y.clone()
        for name in set(adapter_names) & set(self.diablo_blocks):
            rows = torch.tensor([row for row, other in enumerate(adapter_names) if other == name], device=y.device)
            y[rows] = self._add(y[rows], x[rows], name)
        return y

    def _check_mixed(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise DiabloPeftError(
                f"Length of `adapter_names` should be the same as the number of inputs, "
                f"but got {len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise DiabloPeftError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, each rounded once to its dtype; only the entries they meet change.

        Args:
            safe_merge: look for NaN and inf before the weight is changed.
            adapter_names: which; None for the active ones.

        Raises:
            DiabloPeftError: a quantized base, or (with `safe_merge`) a sum that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.diablo_blocks]
        if names and not is_mergeable(self.base_layer):
            raise DiabloPeftError(refusal([type(self.base_layer).__name__]))
        for name in names:
            pieces = touched(self.base_layer, self.blocks(name), self.diablo_shapes[name])
            sums = [_sum(entries, block) for entries, block in pieces]
            if safe_merge and not all(bool(torch.isfinite(total).all()) for total in sums):
                raise DiabloPeftError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._replaced.append([entries.clone() for entries, _ in pieces])
            for (entries, _), total in zip(pieces, sums, strict=True):
                entries.copy_(total)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own values back, bit for bit, the adapter merged last first."""
        while self.merged_adapters:
            name, values = self.merged_adapters.pop(), self._replaced.pop()
            pieces = touched(self.base_layer, self.blocks(name), self.diablo_shapes[name])
            for (entries, _), own in zip(pieces, values, strict=True):
                entries.copy_(own)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight, in that weight's own orientation."""
        blocks, shape = self.blocks(adapter), self.diablo_shapes[adapter]
        delta: Tensor = blocks.new_zeros(shape.in_features, shape.out_features)
        for block, (inputs, outputs) in zip(blocks, shape.slices(), strict=True):
            delta[inputs, outputs] = block[: inputs.stop - inputs.start, : outputs.stop - outputs.start]
        return delta if isinstance(self.base_layer, Conv1D) else delta.T

    @torch.no_grad()
    def base_weight(self) -> Array | None:
        """The float base weight (out, in) without what is merged, or None where there is no such thing in memory."""
        if not is_mergeable(self.base_layer) or self.weight.is_meta:
            return None
        weight = self.weight.detach()
        if self.merged:
            weight = weight.clone()
            oriented = weight if isinstance(self.base_layer, Conv1D) else weight.T  # (in, out)
            for name, values in zip(reversed(self.merged_adapters), reversed(self._replaced), strict=True):
                for (inputs, outputs), own in zip(self.diablo_shapes[name].slices(), values, strict=True):
                    oriented[inputs, outputs] = own
        return to_numpy(weight.T if isinstance(self.base_layer, Conv1D) else weight)

    def __repr__(self) -> str:
        """The layer in the model's printed form."""
        return f"diablo.{super().__repr__()}"


def _sum(entries: Tensor, block: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(entries.dtype, block.dtype), torch.float32)
    return (entries.to(wide) + block.to(entries.device, wide)).to(entries.dtype)


def plain_name(path: str) -> str:
    """The path of a module or parameter without what FSDP, checkpointing and torch.compile put around modules."""
    return _WRAPPERS.sub("", path)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, float or quantized by any library; None for other modules."""
    if isinstance(module, BaseTunerLayer | nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # the latter is inside nn.MultiheadAttention, which uses its weight and never calls it
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return rows, columns
    if isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
        for names in _SIZE_NAMES:
            sizes = tuple(getattr(module, name, None) for name in names)
            if isinstance(sizes[0], int) and isinstance(sizes[1], int):
                return sizes[0], sizes[1]
    return None


def is_mergeable(module: nn.Module) -> bool:
    """Whether the layer's weight holds its plain float values, so that blocks can be added to them."""
    if not is_linear(module):
        return False
    weight: Any = module.weight  # under FSDP it is no parameter
    shape = tuple(weight.shape) if isinstance(module, Conv1D) else tuple(weight.shape)[::-1]
    plain = type(weight) in {nn.Parameter, Tensor}  # quantization libraries have subclasses
    return plain and weight.dtype in _MERGEABLE and shape == linear_sizes(module)


def refusal(layers: list[str]) -> str:
    """Why these layers cannot be merged into, and what to do."""
    return (
        f"blocks cannot be merged into quantized layers ({', '.join(layers)}): rounding to their grid again can erase "
        "the adapter. Keep it as a branch, or merge into the float model with `diablo-export merge`, which quantizes "
        "afterwards and measures what is left"
    )


def to_numpy(tensor: Tensor) -> Array:
    """A tensor in numpy, in its own dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array
