"""What the inputs of linear layers look like: E[x xᵀ], over the groups that each block meets, or over all of them."""

from __future__ import annotations

import threading
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
from diablo_export.trainer.hooks import removed_after
from diablo_export.trainer.layer import DiabloLinear, diablo_layers, features, is_linear

_KEPT = 1 << 29  # bytes of moments that are held at once


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

    with removed_after([layers[name].register_forward_pre_hook(look(name)) for name in sizes]):
        for start in range(0, len(items), batch_size):
            logits(network, items[start : start + batch_size], pad, state)
            advance(1)
    return {name: [(total / count[name]).cpu().numpy() for total in totals] for name, totals in sums.items()}


class InputMoments:
    """Second moments of all inputs of any layer, by module path: taken when they are asked for, a few layers at a time.

    What is kept is what was asked for last and its neighbours, so asking in the order of the network costs a pass over
    the text for each _KEPT bytes of moments. May be called from several threads.
    """

    def __init__(self, network: nn.Module, items: Sequence[Encoded], *, batch_size: int, pad: int = 0) -> None:
        """Take them of what `network` reads at `items`."""
        self._network, self._items, self._size, self._pad = network, items, batch_size, pad
        inner = {f"{name}.base" for name in diablo_layers(network)}
        self._names = [name for name, one in network.named_modules() if _inputs(one) and name not in inner]
        self._found: dict[str, Float32] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Float32:
        """E[x xᵀ], (in_features, in_features)."""
        with self._lock:
            if name not in self._found:
                self._found = self._take(self._next(name))
            return self._found[name]

    def _next(self, name: str) -> list[str]:
        """This layer and those behind it, as many as may be kept; at least this one."""
        chosen, left = [name], _KEPT - 4 * _inputs(self._network.get_submodule(name)) ** 2
        for other in self._names[self._names.index(name) + 1 :] if name in self._names else ():
            left -= 4 * _inputs(self._network.get_submodule(other)) ** 2
            if left < 0:
                break
            chosen.append(other)
        return chosen

    @torch.inference_mode()
    def _take(self, names: list[str]) -> dict[str, Float32]:
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(names, 0)

        def look(name: str) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, given: Any) -> None:
                x = given[0].reshape(-1, given[0].shape[-1]).float()
                sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
                counts[name] += len(x)

            return hook

        modules = {name: self._network.get_submodule(name) for name in names}
        with removed_after([module.register_forward_pre_hook(look(name)) for name, module in modules.items()]):
            for start in range(0, len(self._items), self._size):
                logits(self._network, self._items[start : start + self._size], self._pad, "branch")
        return {name: (total / counts[name]).cpu().numpy() for name, total in sums.items()}


def _inputs(module: nn.Module) -> int:
    """The inputs of a linear layer, also with blocks beside it; 0 of any other."""
    if isinstance(module, DiabloLinear):
        return module.shape.in_features
    return features(module)[0] if is_linear(module) else 0
