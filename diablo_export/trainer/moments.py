"""What the inputs of grid layers look like: E[x xᵀ] over the groups that each block meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_export.quantization import Float32
from diablo_export.requantize import touched
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import logits
from diablo_export.trainer.grid import State, grid_layers


@torch.inference_mode()
def input_moments(
    network: nn.Module,
    items: Sequence[Encoded],
    sizes: dict[str, int],
    *,
    batch_size: int,
    pad: int = 0,
    state: State = "branch",
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, list[Float32]]:
    """Second moments of the inputs of some layers, block by block.

    Args:
        network: holds `GridLinear` layers.
        items: token sequences.
        sizes: group size of each layer that is asked for, by module path.
        batch_size: sequences at once.
        pad: the id that fills short sequences up; it does weigh in, a little.
        state: what the network computes meanwhile.
        advance: is called with 1 after each batch.

    Returns:
        Per layer and block, in `requantize.touched`'s order: (columns, columns) of the whole groups, as zeros past the
        last input.
    """
    layers = grid_layers(network)
    sums: dict[str, list[Tensor]] = {name: [] for name in sizes}
    count = dict.fromkeys(sizes, 0)

    def look(name: str) -> Callable[[nn.Module, Any], None]:
        parts = [groups for _, groups in touched(layers[name].shape, sizes[name])]

        def hook(module: nn.Module, arguments: Any) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            x = functional.pad(x, (0, -x.shape[1] % sizes[name]))
            count[name] += len(x)
            products = []
            for groups in parts:
                piece = x[:, groups.start * sizes[name] : groups.stop * sizes[name]]
                products.append(piece.T @ piece)
            before = sums[name] or [torch.zeros_like(product) for product in products]
            sums[name] = [old + new for old, new in zip(before, products, strict=True)]

        return hook

    handles = [layers[name].register_forward_pre_hook(look(name)) for name in sizes]
    try:
        for start in range(0, len(items), batch_size):
            logits(network, items[start : start + batch_size], pad, state)
            advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [(total / count[name]).cpu().numpy() for total in totals] for name, totals in sums.items()}
