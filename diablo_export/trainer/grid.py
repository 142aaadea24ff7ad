"""A linear layer on an integer grid whose codes can be trained: y = x · W, W = (code − zero) · scale.

Three states of one layer: the quantized base, base + float blocks, and the grid that is to be written. On the grid the
codes of the groups that a block meets are trained straight-through, under the block and beside it: latents in code
units, rounded on the way forward, as if not rounded on the way back. What is trained is what is written: the codes, and
nothing is lost between the two.

Rounding can be brought in by degrees (`hardness`), so that a merge begins at the float branch itself and the latents
that still may move make up for those that are nearly codes (alpha-blending, arXiv 1903.01061).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from diablo_export.blockdiag import Array, BlockShape
from diablo_export.requantize import Grid, met
from diablo_export.trainer.layer import add_branch

State = Literal["base", "branch", "grid"]
_NEAR = 0.4  # of a code unit: rounds to its code, and a step of the optimizer does not change that


class CodedLinear(nn.Module):
    """A linear layer whose codes are trained, as numbers that round to them.

    Attributes:
        weight: (out, in); frozen.
        bias: or None.
        latent: in code units: what is trained; None where nothing is.
        stretch: by what share each scale grows, trained likewise.
        state: which weights the layer computes with.
        hardness: 1: latents are rounded; 0: not at all; between the two, so much of the way.
    """

    weight: Tensor
    bias: Tensor | None
    latent: nn.Parameter | None
    stretch: nn.Parameter | None
    _grid: Grid

    def __init__(self, linear: nn.Module) -> None:
        """Take over the weight and the bias of `linear` (nn.Linear or Conv1D), frozen."""
        super().__init__()
        weight, bias = linear.get_parameter("weight").detach(), linear.bias
        if isinstance(linear, Conv1D):
            weight = weight.T
        self.register_buffer("weight", weight.contiguous(), persistent=False)
        self.register_buffer("bias", bias.detach() if isinstance(bias, Tensor) else None, persistent=False)
        self.state: State = "grid"
        self.hardness = 1.0

    def rounded(self) -> Tensor:
        """The latents' codes on the way forward, the latents themselves on the way back."""
        assert self.latent is not None
        return self.latent + self.hardness * (self.latent.round() - self.latent).detach()

    @torch.no_grad()
    def project(self) -> None:
        """Bring latents that left the grid's range back to its ends: after each step of an optimizer."""
        if self.latent is not None:
            self.latent.clamp_(0, self._grid.top)


class GridLinear(CodedLinear):
    """A quantized linear layer with blocks, and the grid that both are merged into.

    Attributes:
        weight: (out, in), the base's values, dequantized; frozen.
        bias: the base's, or None.
        blocks: (num_blocks, block_size_in, block_size_out), the float branch; frozen.
        latent: (num_blocks, width, block_size_out), codes of all inputs in the groups that each block meets: what is
            trained. None for a layer that is not quantized, whose merge is exact: its grid state is its branch state.
        stretch: None: scales stay.
        state: which of the three the layer computes.
    """

    blocks: Tensor
    _codes: Tensor
    _scales: Tensor
    _columns: Tensor | None

    def __init__(self, linear: nn.Module, shape: BlockShape, blocks: Array, grid: Grid | None) -> None:
        """Take over `linear` (nn.Linear or Conv1D); with a grid (out, groups, size) its values replace the weight."""
        super().__init__(linear)
        self.shape = shape
        self.register_buffer(
            "blocks", torch.from_numpy(blocks.astype(np.float32)).to(self.weight.device), persistent=False
        )
        self.latent = self.stretch = None
        self._start: Tensor | None = None  # the grid's values at its beginning, where they are not the base's
        if grid is not None:
            self.weight.copy_(self._dense(grid))
            self.begin(grid)

    def begin(self, grid: Grid, target: Array | None = None, near: bool = False) -> None:
        """Lay the merged weight onto `grid` (out, groups, size).

        Args:
            grid: codes, scales and zero points of the whole layer.
            target: (out, in), where the weights should be: there, and not at their codes, the latents then begin.
            near: only so far toward it that they still round to their codes: those that it pulls at change first.
        """
        values = self._dense(grid)
        self._start = None if torch.equal(values, self.weight) else values
        self._grid = grid
        size = grid.codes.shape[-1]
        self._places = list(met(self.shape, size))
        width = max(inputs.stop - inputs.start for inputs, _ in self._places)
        self._wide = self._widened(width)
        scales, zeros = (np.repeat(each, size, axis=1) for each in (grid.scales, grid.zeros))
        codes = grid.codes.reshape(len(scales), -1).astype(np.float32)
        latent = codes
        if target is not None:
            inside = slice(0, target.shape[1])
            usable = np.where(scales == 0, np.float32(np.inf), scales)[:, inside]
            latent = np.clip(target / usable + zeros[:, inside], 0, grid.top)
            if near:
                latent = np.clip(latent, codes[:, inside] - _NEAR, codes[:, inside] + _NEAR)
        for name, each in (("_codes", codes), ("_scales", scales)):
            self.register_buffer(name, self._met(each), persistent=False)
        self.latent = nn.Parameter(self._met(latent))

    @torch.no_grad()
    def lay(self, base: Grid, grid: Grid | None) -> None:
        """Put the layer on another base, and lay the merged weight onto `grid`; None: the branch stays one."""
        self.weight.copy_(self._dense(base))
        self.begin(grid or base)
        if grid is None:
            self.latent = None  # the grid state is the branch state

    def finish(self) -> Grid:
        """The grid with the codes that the latents round to."""
        assert self.latent is not None
        codes = self._grid.codes.reshape(len(self._grid.codes), -1).copy()
        trained = self.latent.detach().round().to(torch.uint8).cpu().numpy()
        for block, (inputs, outputs) in enumerate(self._places):
            part = trained[block, : inputs.stop - inputs.start, : outputs.stop - outputs.start]
            codes[outputs, inputs] = part.T
        return replace(self._grid, codes=codes.reshape(self._grid.codes.shape))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        merged = self.state == "grid" and self.latent is not None
        weight = self._start if merged and self._start is not None else self.weight
        y = functional.linear(x, weight, self.bias)
        if self.state == "base":
            return y
        if not merged:
            return add_branch(y, x, self.blocks, self.shape)
        return add_branch(y, x if self._columns is None else x[..., self._columns], self._moved(), self._wide)

    def _moved(self) -> Tensor:
        """How far the codes have moved each weight in the groups, (num_blocks, width, block_size_out)."""
        return (self.rounded() - self._codes) * self._scales

    def _widened(self, width: int) -> BlockShape:
        """The blocks as wide as the groups that they meet, over the inputs that `_columns` brings together for them."""
        blocks, outputs = self.shape.num_blocks, self.shape.block_size_out
        starts = np.array([inputs.start for inputs, _ in self._places])
        columns = starts[:, None] + np.arange(width)  # (num_blocks, width)
        if width == self.shape.block_size_in:  # blocks of whole groups: as they lie
            self.register_buffer("_columns", None, persistent=False)
            return self.shape
        columns = np.minimum(columns, self.shape.in_features - 1).reshape(-1)  # nothing moves in padding
        self.register_buffer("_columns", torch.from_numpy(columns).to(self.weight.device), persistent=False)
        return BlockShape(columns.size, self.shape.out_features, blocks, width, outputs)

    def _dense(self, grid: Grid) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(grid.weight(self.shape.in_features))).to(self.weight.device)

    def _met(self, values: Array) -> Tensor:
        """The entries of (out, columns) in the groups that a block meets, as blocks; 0 in padding."""
        found = np.zeros(self._wide.blocks, np.float32)
        for block, (inputs, outputs) in enumerate(self._places):
            part = values[outputs, inputs].T
            found[block, : len(part), : part.shape[1]] = part
        return torch.from_numpy(found).to(self.weight.device)

    def extra_repr(self) -> str:
        """Blocks and bits, in the model's printed form."""
        bits = "float" if self.latent is None else f"{self._grid.bits} bits"
        return "blocks={}×{}×{}, {}".format(*self.shape.blocks, bits)


def grid_layers(network: nn.Module) -> dict[str, GridLinear]:
    """The grid layers of a network by module path."""
    return {name: module for name, module in network.named_modules() if isinstance(module, GridLinear)}


def coded_layers(network: nn.Module) -> list[CodedLinear]:
    """The layers of a network whose codes are, or can be, trained."""
    return [module for module in network.modules() if isinstance(module, CodedLinear)]


def set_state(network: nn.Module, state: State) -> None:
    """Have every layer on a grid compute the base, base + branch, or the grid."""
    for layer in coded_layers(network):
        layer.state = state
