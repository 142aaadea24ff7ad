"""One trial: a method at one learning rate on the data of a sweep, through `train`'s own loop; nothing is kept."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diablo_export.errors import InputError
from diablo_export.trainer.baselines import BASE, adapt, equal_rank
from diablo_export.trainer.batches import Batches
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.learner import owners
from diablo_export.trainer.loop import Step, learning_rate, train_loop, warm_up
from diablo_export.trainer.model import checkpoint_activations, head_parameters, load_with_fresh, text_config
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.options import use_bfloat16
from diablo_export.trainer.prepare import open_base
from diablo_export.trainer.prepare import prepare as prepare_lesson
from diablo_export.trainer.targets import choose_targets

_SPLIT = 0  # seed of the lines held out: the same ones in every trial


@dataclass(frozen=True)
class Ground:
    """What all trials of a sweep share."""

    model: str | Path
    task: str
    labels: list[str] | None
    dtype: str  # that the base is loaded in
    autocast: bool
    place: torch.device
    pad: int
    items: list[Encoded]
    held: list[Encoded]
    steps: int
    how: dict[str, Any]  # batch_size, grad_accumulation, warmup_steps, schedule, weight_decay, clip, …

    def load(self) -> tuple[Any, list[str]]:
        """The frozen base, and the names of what every method trains with it: a classifier's head."""
        network, _, fresh = load_with_fresh(
            self.model, self.task, dtype=self.dtype, device=self.place, labels=self.labels
        )
        text_config(network).use_cache = False
        head = [] if self.labels is None else head_parameters(network, fresh)
        for name in head:
            network.get_parameter(name).requires_grad_(True)
        return network, head


def prepare(
    model: str | Path,
    data: str | Path,
    *,
    place: torch.device,
    task: str,
    dtype: str,
    epochs: float,
    max_steps: int | None,
    max_length: int | None,
    eval_data: str | Path | None,
    eval_fraction: float,
    **how: Any,
) -> Ground:
    """Read and encode the data once for all trials; the options are those of `train`.

    Raises:
        InputError: bad data, or a model that cannot be loaded.
    """
    autocast = use_bfloat16(dtype, place)
    lesson = prepare_lesson(
        open_base(model), data, task=task, autocast=autocast, device="cpu", max_length=max_length, eval_data=eval_data,
        eval_fraction=eval_fraction, seed=_SPLIT,
    )  # fmt: skip
    per_epoch = Batches(lesson.items, how["batch_size"], how["grad_accumulation"]).steps_per_epoch
    steps = max_steps or math.ceil(epochs * per_epoch)
    return Ground(
        model, task, lesson.labels, lesson.dtype, autocast, place, lesson.pad, lesson.items, lesson.held, steps, how
    )


def trial(
    ground: Ground,
    *,
    method: str,
    lr: float | None,
    num_blocks: int | None,
    target_modules: Sequence[str] | None,
    seed: int,
    keep: Callable[[Any], None] = lambda network: None,
) -> dict[str, Any]:
    """Train once and say how it went.

    Args:
        ground: what all trials share.
        method: see `baselines.METHODS`; `base` evaluates the model as it is.
        lr: peak learning rate.
        num_blocks: one in num_blocks of the targets' weights is trained; nothing to `full`.
        target_modules: see `choose_targets`; nothing to `full`.
        seed: of the fresh head, the order of the data, dropout, and what a method draws.
        keep: is shown the trained network, for those who want more of it than figures.

    Returns:
        `eval_loss` (and `eval_accuracy`) after the last step; `parameters` trained, LoRA's `rank`, `steps`,
        `train_loss` (mean of the last tenth), `step_seconds` (median), `seconds`; `diverged`, a message, in place of
        the losses where training broke off.
    """
    began, how = time.perf_counter(), ground.how
    torch.manual_seed(seed)
    network, head = ground.load()
    objective = Objective(network, ground.labels is not None, ground.pad, ground.place, ground.autocast)
    if method == BASE:
        return objective.evaluate(ground.held, how["batch_size"])
    assert lr is not None
    batches = Batches(ground.items, how["batch_size"], how["grad_accumulation"], seed)
    warmup = warm_up(ground.steps, how["warmup_steps"])

    def backward() -> None:
        for part in (part for step in range(max(1, warmup)) for part in batches(step)):
            (objective.loss(part) / objective.targets(part)).backward()  # type: ignore[no-untyped-call]

    targets = [] if method == "full" else choose_targets(network, target_modules, exclude=owners(head))
    rank = {"rank": equal_rank(network, targets, num_blocks or 1)} if method in ("lora", "dora") else {}
    trained = adapt(network, method, targets, num_blocks or 1, seed=seed, backward=backward)
    if how["gradient_checkpointing"]:
        checkpoint_activations(network)
    if not ground.autocast:
        fold_blocks(diablo_layers(network).values())  # as `train` does
    done: list[Step] = []
    network.train()
    try:
        train_loop(
            torch.optim.AdamW(trained.values(), lr=lr, weight_decay=how["weight_decay"]),
            batches=batches, loss=objective.loss, targets=objective.targets, steps=ground.steps, seed=seed,
            rate=learning_rate(lr, ground.steps, warmup, how["schedule"]), clip=how["clip"] or None,
            after_step=done.append,
        )  # fmt: skip
        outcome = _outcome(objective.evaluate(ground.held, how["batch_size"]), done)
        keep(network)
    except InputError as error:  # the loop's own word for a loss that is no number
        outcome = {"diverged": str(error)}
    return {
        **outcome, **rank, "parameters": sum(parameter.numel() for parameter in trained.values()),
        "steps": ground.steps, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _outcome(values: dict[str, float], done: Sequence[Step]) -> dict[str, Any]:
    """What a finished run came to; JSON has no NaN, so that a loss that is none is said in words."""
    if not math.isfinite(values["eval_loss"]):
        return {"diverged": f"the held-out loss is {values['eval_loss']} after the last step"}
    last = done[-max(1, len(done) // 10) :]
    return {
        **values,
        "train_loss": statistics.fmean(step.loss for step in last),
        "step_seconds": statistics.median(step.seconds for step in done),
    }
