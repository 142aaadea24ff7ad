"""Learned rounding: all codes and scales of a linear layer trained beside the float weight that they stand for.

`grid.GridLinear` moves the groups that a block meets, beside a base that stays on its grid. Here the whole weight is on
its way to a grid: each code may be rounded another way and each group's scale may shrink or grow. The idea is
SignRound's (arXiv 2309.05516) and OmniQuant's (2308.13137), who train layer after layer on its outputs; where the whole
model fits, the same latents are trained on its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_export.requantize import Grid
from diablo_export.trainer.batches import Batches
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import divergence, logits, optimise
from diablo_export.trainer.grid import CodedLinear, State
from diablo_export.trainer.model import replace_module


class RoundedLinear(CodedLinear):
    """A linear layer in two states: its float weight (`branch`), and the grid that it is rounded to (`grid`).

    Attributes:
        weight: (out, in), float; frozen.
        bias: or None.
        latent: (out, groups, size), in code units.
        stretch: (out, groups, 1), by what share each scale grows: trained likewise.
    """

    latent: nn.Parameter
    stretch: nn.Parameter
    _zeros: Tensor
    _scales: Tensor

    def __init__(self, linear: nn.Module, grid: Grid) -> None:
        """Take over `linear` (nn.Linear or Conv1D), to begin at the codes of a grid (out, groups, size).

        Measured: latents that began nearer to the float weights, at the edges of their codes, all moved at once.
        """
        super().__init__(linear)
        self._grid = grid
        for name, values in (("_scales", grid.scales), ("_zeros", grid.zeros)):
            kept = torch.from_numpy(values.astype(np.float32)[..., None]).to(self.weight.device)
            self.register_buffer(name, kept, persistent=False)
        self.latent = nn.Parameter(torch.from_numpy(grid.codes.astype(np.float32)).to(self.weight.device))
        self.stretch = nn.Parameter(torch.zeros_like(self._scales))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        return functional.linear(x, self._values() if self.state == "grid" else self.weight, self.bias)

    def _values(self) -> Tensor:
        """The grid's weight, (out, in)."""
        values = (self.rounded() - self._zeros) * (self._scales * (1 + self.stretch))
        return values.flatten(1)[:, : self.weight.shape[1]]

    @torch.no_grad()
    def settle(self) -> None:
        """Have each latent begin anew at the middle of its code: near an end of it, the first steps would move it."""
        self.latent.round_()

    def finish(self) -> Grid:
        """The grid as it is now."""
        codes = self.latent.detach().round().to(torch.uint8).cpu().numpy()
        scales = (self._scales * (1 + self.stretch.detach()))[..., 0].cpu().numpy()
        return replace(self._grid, codes=codes, scales=scales)


def round_linear(network: nn.Module, grids: Mapping[str, Grid]) -> dict[str, RoundedLinear]:
    """Replace the linear layers at these module paths by `RoundedLinear` ones that begin at these grids."""
    found = {name: RoundedLinear(network.get_submodule(name), grid) for name, grid in grids.items()}
    for name, layer in found.items():
        replace_module(network, name, layer)
    return found


def learn(
    network: nn.Module,
    items: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    pad: int = 0,
    seed: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[float]:
    """Train all codes and scales of a network on the answers that it gives with its float weights.

    Args:
        network: holds `RoundedLinear` layers.
        items: token sequences.
        steps: of Adam.
        batch_size: sequences in a step.
        lr: as `distillation.distil`'s.
        pad: the id that fills short sequences up.
        seed: of the order.
        advance: is called with 1 after each step.

    Returns:
        The loss of each step: mean KL from the float answers, in nats.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, RoundedLinear)]
    for layer in layers:
        layer.settle()
    batches = Batches(items, batch_size, seed=seed)

    def loss(step: int) -> Tensor:
        (batch,) = batches(step)
        with torch.no_grad():
            wanted = _chances(network, batch, pad, "branch")
        return divergence(wanted, _chances(network, batch, pad, "grid"))

    return optimise(layers, loss, steps=steps, lr=lr, hard=0.0, advance=advance)


def _chances(network: nn.Module, batch: Sequence[Encoded], pad: int, state: State) -> Tensor:
    return functional.log_softmax(logits(network, batch, pad, state), -1)
