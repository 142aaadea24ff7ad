"""Blocks that repair a quantized base: each layer's branch takes back what it can of what rounding did to the layer.

D* = argmin ‖X (W₀ − W_q)ᵀ − X · blockdiag(D)‖², in closed form and for each block by itself: D_n solves
H[i, i] D_n = H[i, :] (W₀ − W_q)ᵀ[:, o], where i and o are its inputs and outputs and H = Σ xᵀx over the layer's inputs.
Layer after layer, so that X is what the model repaired so far gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diablo_export.adapter import base_weight
from diablo_export.blockdiag import BlockShape
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log, progress
from diablo_export.trainer import distillation
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.hooks import removed_after
from diablo_export.trainer.layer import DiabloLinear, diablo_layers

TOKENS = 25_600  # of text: blocks that are 96 wide are known to a hundredth from that many
_DAMPING = 0.01  # of H's mean diagonal, added to it: directions that the text hardly shows are left alone


class _EnoughError(Exception):
    """A forward pass has come as far as it need."""


@torch.no_grad()
def repair(
    network: nn.Module,
    checkpoint: Checkpoint,
    items: Sequence[Encoded],
    *,
    batch_size: int,
    pad: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[str]:
    """Set the blocks of a network, in eval mode, to the best repair of its quantized base.

    Args:
        network: holds DiaBlo layers whose bases are packed, and whose blocks are zero.
        checkpoint: has their float weights.
        items: token sequences; `some` picks enough of many.
        batch_size: sequences at once.
        pad: the id that fills short sequences up; it does weigh in, a little.
        advance: is called with the number of layers after these are done.

    Returns:
        Layers that the text never reached, such as a part that the model does not use; their blocks stay zero.
    """
    waiting = diablo_layers(network)
    while waiting and (found := _next_inputs(network, waiting, items, batch_size, pad)):
        for name, moments in found.items():
            layer = waiting.pop(name)
            stored = torch.from_numpy(base_weight(checkpoint, name)).to(moments.device)
            layer.blocks.copy_(_fitted(moments, stored - layer.weight, layer.shape))
        advance(len(found))
    return list(waiting)


def begin_repaired(
    network: nn.Module, checkpoint: Checkpoint, items: Sequence[Encoded], batch_size: int, pad: int
) -> None:
    """Begin a training run at the repair of its base, on text from all over its data."""
    text = sorted(some(items), key=lambda item: len(item.ids))  # little padding
    log.info("repairing the base on %d items", len(text))
    with progress("repairing", len(diablo_layers(network))) as advance:
        missed = repair(network, checkpoint, text, batch_size=batch_size, pad=pad, advance=advance)
    if missed:
        log.warning("not repaired, as the model does not run them on this text: %s", ", ".join(missed))


def some(items: Sequence[Encoded], tokens: int = TOKENS) -> list[Encoded]:
    """Items from all over the data that hold about as many tokens."""
    total = sum(len(item.ids) for item in items)
    return list(items[:: max(1, total // tokens)])


def _next_inputs(
    network: nn.Module, layers: dict[str, DiabloLinear], items: Sequence[Encoded], batch_size: int, pad: int
) -> dict[str, Tensor]:
    """H of the first of these layers that the model comes to, and of those that read the very same input."""
    sums: dict[str, Tensor] = {}
    first: list[Tensor] = []  # the input of this batch

    def look(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            x: Tensor = arguments[0]
            if not first:
                first.append(x)
            if x is not first[0]:
                raise _EnoughError
            flat = x.reshape(-1, x.shape[-1]).float()
            sums[name] = sums.get(name, 0) + flat.T @ flat

        return hook

    with removed_after([layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]):
        for start in range(0, len(items), batch_size):
            first.clear()
            with contextlib.suppress(_EnoughError):
                network(**distillation.inputs(network, items[start : start + batch_size], pad))
    return sums


def _fitted(moments: Tensor, error: Tensor, shape: BlockShape) -> Tensor:
    """The blocks of least squared output error, for H (in, in) and W₀ − W_q (out, in)."""
    blocks = torch.zeros(shape.blocks, device=moments.device)
    damping = _DAMPING * float(moments.diagonal().mean())
    for block, (inputs, outputs) in enumerate(shape.slices()):
        width, height = inputs.stop - inputs.start, outputs.stop - outputs.start
        if width and height and damping > 0:
            own = moments[inputs, inputs].double() + damping * torch.eye(width, device=moments.device)
            wanted = moments[inputs] @ error[outputs].T  # (inputs, outputs)
            blocks[block, :width, :height] = torch.linalg.solve(own, wanted.double()).float()
    return blocks
