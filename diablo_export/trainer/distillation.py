"""Distilling on the grid: codes that make a merged int4 model answer as the base with its float branch does.

Adam on what is missing of the branch's effect in the grid state of the same network: in nats, in squares, and in gain;
only codes of touched groups are trained (`trainer.grid`). Rounding comes in by degrees: latents that begin at
the float branch are codes in the end, and in between the one make up for what the others lose. Any text will do: what
is learned is what the branch says to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_export.trainer.batches import Batches, collate
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.grid import CodedLinear, grid_layers, set_state

HARD = 0.8  # of the steps, after which latents are fully rounded
STRETCH = 0.1  # of the learning rate: a tenth of a code unit is about what a scale grows by at the grid's ends
_NOTHING = 1e-12  # an adapter without effect
_SHRINKAGE = 3.0  # how much the gain counts: 10 cost more cosine than it gave


def distil(
    network: nn.Module,
    items: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    lr: float = 0.05,
    hard: float = HARD,
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
        hard: share of the steps in which rounding comes in; 0 for latents that begin at codes.
        pad: the id that fills short sequences up.
        seed: of the order.
        advance: is called with 1 after each step.

    Returns:
        The loss of each step: `missing` of its batch.
    """
    batches = Batches(items, batch_size, seed=seed)

    def loss(step: int) -> Tensor:
        (batch,) = batches(step)
        with torch.no_grad():
            base, branch = (logits(network, batch, pad, state) for state in ("base", "branch"))
        return missing(base, branch, logits(network, batch, pad, "grid"))

    return optimise(grid_layers(network).values(), loss, steps=steps, lr=lr, hard=hard, advance=advance)


def optimise(
    layers: Collection[CodedLinear],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 0.05,
    hard: float = HARD,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[float]:
    """Train the latents of grid layers, from float to rounded, and their scales.

    Args:
        layers: each begun on a grid.
        loss: of a step, with a gradient to the latents.
        steps: of Adam.
        lr, hard: as `distil`'s.
        advance: is called with 1 after each step.

    Returns:
        The loss of each step.
    """
    latents = [layer.latent for layer in layers if layer.latent is not None]
    stretches = [layer.stretch for layer in layers if layer.stretch is not None]
    optimizer = torch.optim.Adam([{"params": latents}, {"params": stretches}], lr=lr)
    losses: list[float] = []
    for step in range(steps):
        for layer in layers:
            layer.hardness = min(1.0, step / (hard * steps)) if hard else 1.0
        for group, share in zip(optimizer.param_groups, (1.0, STRETCH), strict=True):
            group["lr"] = share * lr * (1 - step / steps)
        lost = loss(step)
        optimizer.zero_grad()
        torch.autograd.backward(lost)
        optimizer.step()
        for layer in layers:
            layer.project()
        losses.append(float(lost.detach()))
        advance(1)
    for layer in layers:
        layer.hardness = 1.0
    return losses


def missing(base: Tensor, branch: Tensor, grid: Tensor) -> Tensor:
    """What the grid lacks of the branch's effect on logits (positions, classes): 2 for the base itself, and 3 more.

    The KL divergence, as a share of the base's, says nothing of tokens that are unlikely; the squared difference does,
    as a share of the effect's square. Either is least where the effect is somewhat too small, as whatever is fitted to
    rounded numbers is; so the gain's distance from 1 counts on its own, three times. What is added to all logits of a
    position is no effect.
    """
    wanted, effect = (each - each.mean(-1, keepdim=True) for each in (branch - base, grid - base))
    whole = wanted.square().sum().clamp_min(_NOTHING)
    squares, gain = (effect - wanted).square().sum() / whole, (effect * wanted).sum() / whole
    chances = [functional.log_softmax(each, -1) for each in (branch, grid, base)]
    lost, there = (divergence(chances[0], each) for each in chances[1:])
    shares: Tensor = lost / there.clamp_min(_NOTHING) + squares + _SHRINKAGE * (1 - gain).square()
    return shares


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean KL(wanted ‖ found) of log-probabilities (positions, classes), in nats."""
    return functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def logits(network: nn.Module, batch: Sequence[Encoded], pad: int, state: str) -> Tensor:
    """Logits of a batch in one state, float32: (positions, vocabulary), or (items, labels) of a classifier."""
    set_state(network, state)  # type: ignore[arg-type]
    given = inputs(network, batch, pad)
    return unpadded(network(**given).logits, given["attention_mask"])


def inputs(network: nn.Module, batch: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """What a network is called with: input_ids and attention_mask, (items, tokens)."""
    arrays = collate(batch, pad, classify=False)
    device = next(network.parameters()).device
    return {name: torch.from_numpy(arrays[name]).to(device) for name in ("input_ids", "attention_mask")}


def unpadded(output: Tensor, mask: Tensor) -> Tensor:
    """Logits where a token is, float32: (positions, vocabulary), or (items, labels) of a classifier."""
    return (output[mask.bool()] if output.ndim == 3 else output).float()
