"""The training loop, on one screen: what is learned, from which batches, and what follows a step are functions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diablo_export.errors import InputError
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.processes import ALONE, whole

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Step:
    """What one finished step was like."""

    step: int  # finished steps so far
    loss: float  # mean over the step's targets
    lr: float
    grad_norm: float  # before clipping
    tokens: int
    seconds: float


def train_loop(
    optimizer: torch.optim.Optimizer,
    *,
    batches: Callable[[int], Sequence[Sequence[Encoded]]],
    loss: Callable[[Sequence[Encoded]], Tensor],
    targets: Callable[[Sequence[Encoded]], int],
    rate: Callable[[int], float],
    steps: int,
    start: int = 0,
    clip: float | None = 1.0,
    seed: int = 0,
    culprit: Callable[[Sequence[Sequence[Encoded]]], str] = lambda parts: "",
    add_up: Callable[[Sequence[nn.Parameter], float], float] = ALONE.add_up,
    backward: Callable[[Tensor, bool], None] = lambda loss, last: torch.autograd.backward(loss),
    clip_norm: Callable[[Sequence[nn.Parameter], float], Tensor] = nn.utils.clip_grad_norm_,
    after_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Train from step `start` up to `steps`.

    A step depends on its number and on the state of model and optimizer only: its batches and its random numbers
    (dropout) follow from the number. A run that is resumed therefore ends in the very same weights.

    Args:
        optimizer: of all that is trained.
        batches: the batches of a step; their gradients are accumulated.
        loss: the sum of one batch's losses over its targets.
        targets: how many targets one batch has.
        rate: the learning rate of a step.
        clip: largest norm of the gradient, or None.
        culprit: says where a step's batches broke the numbers, when they did.
        add_up: adds gradients, in place, and loss up over processes that train together; none is missing afterwards.
        backward: adds up the gradients of a batch's loss; told whether it is the step's last.
        clip_norm: clips the gradient to a norm, and says what that was before.
        after_step: sees each finished step, to log, evaluate and save; what it raises ends the training.

    Raises:
        InputError: loss or gradient is NaN or infinite, or the loss depends on nothing that is trained; the weights are
            still those of the step before.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(start, steps):
        began = time.perf_counter()
        torch.manual_seed(_mixed(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        parts = batches(step)
        count = sum(targets(part) for part in parts)  # so that every target weighs the same, however batches fall
        total = 0.0
        for part in parts:
            share = loss(part) / count
            if not share.requires_grad:
                raise InputError(
                    f"step {step + 1} reaches nothing that is trained: this model does not use these --target-modules "
                    "for its answer; choose others"
                )
            backward(share, part is parts[-1])
            total += share.item()
        total = add_up(parameters, total)
        norm = whole(clip_norm(parameters, clip or math.inf)).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            torch.manual_seed(_mixed(seed, step))  # the same dropout again
            raise _diverged(step, total, norm, rate(step), culprit(parts))
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(item.ids) for part in parts for item in part)
        after_step(Step(step + 1, total, rate(step), norm, tokens, time.perf_counter() - began))


def warm_up(steps: int, given: int | None) -> int:
    """How many of a run's steps warm up: as many as given, or a twentieth."""
    return steps // 20 if given is None else min(steps, given)


def learning_rate(lr: float, steps: int, warmup: int, schedule: str) -> Callable[[int], float]:
    """The learning rate of each step: rising from 0 over `warmup` steps to `lr`, then falling to zero (or constant).

    The same numbers as transformers' get_<schedule>_schedule_with_warmup.
    """

    def rate(step: int) -> float:
        if step < warmup:
            return lr * step / warmup
        left = (steps - step) / max(steps - warmup, 1)  # 1 at the end of warm-up, 0 after the last step
        return lr * {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]

    return rate


def _mixed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63  # as far as torch's seeds go


def _diverged(step: int, loss: float, norm: float, lr: float, where: str) -> InputError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    if " itself holds " in where and step == 0:  # it came with the model; later on it may be the optimizer's doing
        return InputError(f"{what} at step {step + 1}: {where}; the model itself is broken, copy it again")
    return InputError(
        f"{what} at step {step + 1} (learning rate {lr:.3g}){', ' * bool(where)}{where}: training diverged and was "
        "stopped; start anew with a lower --lr, more --warmup-steps, or --dtype float32"
    )
