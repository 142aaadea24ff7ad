"""Where a step's numbers broke: the first module whose output, or whose output's gradient, is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diablo_export.trainer.hooks import removed_after
from diablo_export.trainer.processes import local


def first_nonfinite(model: nn.Module, losses: Iterator[Callable[[], Tensor]]) -> str:
    """Go through a step that came to no number once more, looking at every module on the way.

    Args:
        model: with the weights that the step began with.
        losses: of the step's batches; each is worked out and differentiated, until something is found.

    Returns:
        What is wrong where, in words; gradients that were there before are gone.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"{name} itself holds {_kind(parameter)}"
    found: list[str] = []
    modules = [(name, module) for name, module in model.named_modules() if name]
    with removed_after([module.register_forward_hook(_look(name, found)) for name, module in modules]):
        for loss in losses:
            model.zero_grad()
            torch.autograd.backward(loss())
            if found:
                return f"first in {found[0]}"
    sizes = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, size in sizes.items() if size != size or size == float("inf")]
    if broken:
        return f"first in the gradient of {broken[0]}"
    if not sizes:
        return "in no module's output, but in the loss itself"
    largest = max(sizes, key=lambda name: sizes[name])
    return f"in no module by itself; the largest gradient is that of {largest}, {sizes[largest]:.3g}"


def _look(name: str, found: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        if found:
            return
        for tensor in _floats(output):
            if not _finite(tensor):
                found.append(f"the output of {name} ({_kind(tensor)})")
                return
            if tensor.requires_grad:
                tensor.register_hook(look_back)  # type: ignore[no-untyped-call]

    def look_back(gradient: Tensor) -> None:
        if not found and not _finite(gradient):
            found.append(f"the gradient that reaches the output of {name} ({_kind(gradient)})")

    return hook


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _floats(value)


def _finite(tensor: Tensor) -> bool:
    return bool(local(tensor.detach()).isfinite().all())


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(local(tensor.detach()).isnan().any()) else "infinity"
