"""Training on the grid: blocks that move the codes of a quantized base, so that merging them loses nothing.

A block's entries are trained as floats, and the layer computes with the nearest whole steps of the base's grid:
straight-through, rounded on the way forward, as if not rounded on the way back. They begin at the float base's own
weights (`initial.begin_at_float`). Rounding comes in by degrees: over the first four fifths of a run the floats harden
into steps, and those that still may move make up for the others. What is evaluated and what is saved are whole steps;
rounding base + blocks onto the base's own grid gives the trained codes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import under_blocks
from diablo_export.console import log
from diablo_export.trainer.layer import DiabloLinear, add_branch
from diablo_export.trainer.loop import Step
from diablo_export.trainer.model import replace_module
from diablo_export.trainer.packed_layer import QuantizedLinear
from diablo_export.trainer.quantized import pack_base

_HARD = 0.8  # of the steps, after which every entry is fully rounded


class OnGridLinear(DiabloLinear):
    """A packed linear layer with blocks that are whole steps of its grid.

    Attributes:
        blocks: (num_blocks, block_size_in, block_size_out), where training wants them; the layer takes `whole()`.
        hardness: in training mode, how much of the way to whole steps is gone: 0 to 1.
    """

    base: QuantizedLinear
    steps: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, layer: DiabloLinear) -> None:
        """Take over a DiaBlo layer whose base is packed."""
        base = layer.base
        assert isinstance(base, QuantizedLinear)
        super().__init__(base, layer.blocks.detach(), layer.shape)
        self.hardness = 1.0
        size = base.codes.shape[-1] * 8 // base.bits
        codes, steps = (
            torch.from_numpy(under_blocks(values.cpu().numpy(), self.shape)).to(self.blocks.device)
            for values in (base.integers().flatten(1).short(), base.scales.repeat_interleave(size, 1))
        )
        top = torch.where(steps == 0, codes, 2**base.bits - 1)  # a group of zeros, or padding: nowhere to go
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("lowest", torch.where(steps == 0, 0, -codes).to(torch.int16), persistent=False)
        self.register_buffer("highest", (top - codes).to(torch.int16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        rounding = (self.whole() - self.blocks).detach()
        hardness = self.hardness if self.training else 1.0
        return add_branch(y, x, self.blocks + hardness * rounding, self.shape)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The blocks in whole steps of the grid, none beyond its ends."""
        moves = (self.blocks / torch.where(self.steps == 0, 1.0, self.steps)).round()
        return moves.clamp(self.lowest, self.highest) * self.steps

    @torch.no_grad()
    def project(self) -> None:
        """Bring entries that left the grid's range back to its ends: after each step of an optimizer."""
        ends = self.lowest * self.steps, self.highest * self.steps  # a step may be negative
        self.blocks.clamp_(torch.minimum(*ends), torch.maximum(*ends))


def lay_base(network: nn.Module, grid: BaseGrid, leave: Collection[str] = ()) -> None:
    """Put the base of a network with blocks on a grid, packed; the blocks on it as well, where the grid says so.

    Args:
        network: its float weights go.
        grid: of all its linear layers.
        leave: module paths that stay float, such as a head that is trained whole.
    """
    size = pack_base(network, grid, leave)
    log.info("base in %s: %.1f MB", grid, size / 1e6)
    if grid.on_grid:
        put_on_grid(network)


def put_on_grid(network: nn.Module) -> None:
    """Have the blocks of every DiaBlo layer move the codes of its packed base."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, DiabloLinear):
            replace_module(network, name, OnGridLinear(layer))


def hardening(network: nn.Module, steps: int, start: int, then: Callable[[Step], None]) -> Callable[[Step], None]:
    """What follows each step of a run: entries stay within the grid and harden, then `then`.

    Hardness is a function of the step alone, so that a resumed run goes on as it would have.

    Args:
        network: holds `OnGridLinear` layers.
        steps: of the run.
        start: steps that are done.
        then: what else follows a step.
    """
    layers = on_grid_layers(network)

    def harden(step: int) -> None:
        for layer in layers:
            layer.hardness = min(1.0, step / (_HARD * steps))

    def after(done: Step) -> None:
        for layer in layers:
            layer.project()
        harden(done.step)
        then(done)

    harden(start)
    return after


@torch.no_grad()
def settle(network: nn.Module) -> None:
    """Make every block the whole steps that its layer computes with: the trained adapter."""
    for layer in on_grid_layers(network):
        layer.blocks.copy_(layer.whole())


def on_grid_layers(network: nn.Module) -> list[OnGridLinear]:
    """The on-grid layers of a network."""
    return [module for module in network.modules() if isinstance(module, OnGridLinear)]
