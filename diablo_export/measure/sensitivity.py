"""How much the answers of a network suffer from an error in the output of each of its layers.

KL(network ‖ network + error) is, to second order, half the error's square in the metric of the Fisher information.
Its diagonal is enough to tell layers apart: the mean square of the gradient of the log-likelihood, with targets drawn
from the network's own predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diablo_export.quantization import Float32
from diablo_export.requantize import Grid, output_error, touched
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import logits
from diablo_export.trainer.grid import GridLinear, grid_layers
from diablo_export.trainer.hooks import removed_after


def fisher(
    network: nn.Module, items: Sequence[Encoded], *, batch_size: int, pad: int = 0, seed: int = 0
) -> dict[str, Float32]:
    """E[(d log p / d y)²] of each output of each grid layer, (out_features,), in the branch state.

    Args:
        network: holds `GridLinear` layers.
        items: token sequences.
        batch_size: sequences at once.
        pad: the id that fills short sequences up.
        seed: of the targets.
    """
    layers = grid_layers(network)
    sums: dict[str, Tensor] = {}
    positions = 0
    generator = torch.Generator().manual_seed(seed)
    with removed_after([layer.register_forward_hook(_watch(name, sums)) for name, layer in layers.items()]):
        for start in range(0, len(items), batch_size):
            found = torch.log_softmax(logits(network, items[start : start + batch_size], pad, "branch"), -1)
            drawn = torch.multinomial(found.detach().exp().cpu(), 1, generator=generator).to(found.device)
            torch.autograd.backward(found.gather(-1, drawn).sum())
            positions += len(found)
    network.zero_grad(set_to_none=True)
    return {name: (total / max(1, positions)).cpu().numpy().astype(np.float32) for name, total in sums.items()}


def nats(layer: GridLinear, grid: Grid, wanted: Float32, moments: Sequence[Float32], weights: Float32) -> float:
    """About what a layer's error adds to the mean KL: ½ Σ_r F_r E[e_r²].

    Args:
        layer: the layer.
        grid: what it holds, (out, groups, size).
        wanted: what it should hold.
        moments: E[x xᵀ] of the groups that each block meets, in `requantize.touched`'s order.
        weights: F, as `fisher` gives it.
    """
    total = 0.0
    for (rows, groups), seen in zip(touched(layer.shape, grid.codes.shape[-1]), moments, strict=True):
        errors = output_error(grid.part(rows, groups), wanted[rows, groups], seen)
        total += 0.5 * float((errors * weights[rows]).sum())
    return total


def _watch(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, given: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # the first layer: nothing before it is trained

        def add(gradient: Tensor) -> None:
            squares = (gradient.float() ** 2).reshape(-1, gradient.shape[-1]).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
