"""Distilling on the grid: codes that make a merged int4 model answer as the base with its float branch does.

Adam on the KL divergence from the branch state of the same network to its grid state; only latents of codes under
the blocks are trained (`trainer.grid`). Rounding comes in by degrees: latents that begin at the float branch are codes
in the end, and in between the one make up for what the others lose. Any text will do: what is learned is what the
branch says to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_export.trainer.batches import Batches, collate
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.grid import grid_layers, set_state

_HARD = 0.8  # of the steps, after which latents are fully rounded


def distil(
    network: nn.Module,
    items: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    lr: float = 0.05,
    pad: int = 0,
    seed: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[float]:
    """Train the latents of a network's grid layers.

    Args:
        network: holds `GridLinear` layers, each begun on a grid.
        items: token sequences.
        steps: of Adam.
        batch_size: sequences in a step.
        lr: peak learning rate in code units, falling to 0: Adam moves a latent by at most about this in a step.
        pad: the id that fills short sequences up.
        seed: of the order.
        advance: is called with 1 after each step.

    Returns:
        The loss of each step: mean KL(branch ‖ grid) over positions, in nats.
    """
    layers = grid_layers(network).values()
    latents = [layer.latent for layer in layers if layer.latent is not None]
    optimizer = torch.optim.Adam(latents, lr=lr)
    batches = Batches(items, batch_size, seed=seed)
    losses: list[float] = []
    for step in range(steps):
        (batch,) = batches(step)
        for layer in layers:
            layer.hardness = min(1.0, step / (_HARD * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        with torch.no_grad():
            wanted = log_chances(network, batch, pad, "branch")
        loss = divergence(wanted, log_chances(network, batch, pad, "grid"))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        for layer in layers:
            layer.project()
        losses.append(float(loss.detach()))
        advance(1)
    for layer in layers:
        layer.hardness = 1.0
    return losses


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean KL(wanted ‖ found) of log-probabilities (positions, classes), in nats."""
    return functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def log_chances(network: nn.Module, batch: Sequence[Encoded], pad: int, state: str) -> Tensor:
    """Log-probabilities of a batch in one state: (positions, vocabulary), or (items, labels) of a classifier."""
    return functional.log_softmax(logits(network, batch, pad, state), -1)


def logits(network: nn.Module, batch: Sequence[Encoded], pad: int, state: str) -> Tensor:
    """Logits of a batch in one state, float32: (positions, vocabulary), or (items, labels) of a classifier."""
    set_state(network, state)  # type: ignore[arg-type]
    arrays = collate(batch, pad, classify=False)
    device = next(network.parameters()).device
    tensors = {name: torch.from_numpy(arrays[name]).to(device) for name in ("input_ids", "attention_mask")}
    output: Tensor = network(**tensors).logits
    return (output[tensors["attention_mask"].bool()] if output.ndim == 3 else output).float()
