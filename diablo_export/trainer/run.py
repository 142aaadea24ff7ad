"""A training run, ready for its first step: base, data and blocks, the optimizer, and what a resumed one must share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diablo_export.adapter import WEIGHTS, Adapter, file_sha256
from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log
from diablo_export.packed.modules import check_base
from diablo_export.trainer.batches import Batches, digest
from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.initial import begin
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.learner import Learner, owners, put_blocks
from diablo_export.trainer.loop import learning_rate, train_loop, warm_up
from diablo_export.trainer.model import checkpoint_activations
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.on_grid import lay_base
from diablo_export.trainer.options import use_bfloat16
from diablo_export.trainer.prepare import Lesson, prepare
from diablo_export.trainer.processes import Processes
from diablo_export.trainer.zero import Zero

# options that a resumed run must share with its beginning, beside those that are worked out from several
_KEPT = (
    "task", "num_blocks", "lr", "batch_size", "grad_accumulation", "schedule", "weight_decay", "clip", "seed",
    "eval_fraction", "steps", "warmup_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and how; without the folders that it writes to.

    Attributes:
        loop: `train_loop` with all but its steps and what follows them.
        settings: that a resumed run must share with its beginning.
    """

    lesson: Lesson
    learner: Learner
    objective: Objective
    batches: Batches
    optimizer: Any
    steps: int
    loop: Callable[..., None]
    settings: dict[str, Any]

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Blocks and head."""
        return list(self.learner.parameters.values())

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.trained)

    def tell(self, batch_size: int) -> None:
        """Say what is about to be trained."""
        log.info(
            "training %s parameters in %d modules on %s: %s items, %d step%s of %d", f"{self.size:,}",
            len(self.learner.marks), self.objective.device.type, f"{len(self.lesson.items):,}", self.steps,
            "s" * (self.steps != 1), batch_size,
        )  # fmt: skip


def make_run(
    checkpoint: Checkpoint,
    grid: BaseGrid | None,
    processes: Processes,
    place: torch.device,
    options: dict[str, Any],
    anew: bool,
) -> Run:
    """Load base and data, and put the blocks where they begin.

    Args:
        checkpoint: of the base.
        grid: that its weights are laid on; None: they stay.
        processes: that train together.
        place: where the network goes.
        options: those of `train`, by name.
        anew: a run from its first step on; else blocks stay zero, for a checkpoint to fill.

    Raises:
        InputError: data, model, targets or an initial adapter that cannot be used.
    """
    given = None
    if options["init_adapter"] is not None:
        given = Adapter.load(options["init_adapter"])
        check_base(checkpoint, given)
    autocast = use_bfloat16(options["dtype"], place)
    torch.manual_seed(options["seed"])  # of a fresh head
    read = {name: options[name] for name in ("task", "max_length", "eval_data", "eval_fraction", "seed")}
    lesson = prepare(checkpoint, options["data"], autocast=autocast, device="cpu" if grid else place, **read)
    objective = Objective(lesson.network, lesson.labels is not None, lesson.pad, place, autocast, processes)
    learner = _learner(lesson, checkpoint, grid, given, objective, options, anew)
    optimizer, by = _optimizer(learner, processes, options)
    batches = Batches(lesson.items, options["batch_size"], options["grad_accumulation"], options["seed"])
    steps = options["max_steps"] or math.ceil(options["epochs"] * batches.steps_per_epoch)
    warmup = warm_up(steps, options["warmup_steps"])
    loop = functools.partial(
        train_loop, optimizer, batches=batches, loss=objective.loss, targets=objective.targets,
        rate=learning_rate(options["lr"], steps, warmup, options["schedule"]), clip=options["clip"] or None,
        seed=options["seed"] + (processes.rank << 32), culprit=objective.culprit, add_up=processes.add_up, **by,
    )  # fmt: skip
    counts = {"num_blocks": learner.num_blocks, "steps": steps, "warmup_steps": warmup}
    settings = _settings(options | counts, learner, lesson, grid, given, autocast)
    return Run(lesson, learner, objective, batches, optimizer, steps, loop, settings)


def _learner(
    lesson: Lesson,
    checkpoint: Checkpoint,
    grid: BaseGrid | None,
    given: Adapter | None,
    objective: Objective,
    options: dict[str, Any],
    anew: bool,
) -> Learner:
    """The base with its blocks, as it is stepped: on its grid, spread over processes, folded."""
    network, processes = lesson.network, objective.processes
    targets, num_blocks = options["target_modules"], options["num_blocks"]
    if given is not None:
        targets, num_blocks = targets or list(given.modules), num_blocks or given.num_blocks
    learner = put_blocks(network, lesson.head, checkpoint, targets, num_blocks or 64)
    if grid is not None:
        lay_base(network, grid, leave=owners(lesson.head))
        network.to(objective.device)
    if anew:
        how: dict[str, Any] = {"repair": options["repair_base"], "batch_size": options["batch_size"]}
        begin(learner, lesson, checkpoint, given=given, grid=grid, **how)
    processes.spread(network)
    if options["gradient_checkpointing"]:
        checkpoint_activations(network)
    if not (objective.autocast or processes.sharded or processes.deepspeed):
        fold_blocks(diablo_layers(network).values())
    return learner


def _optimizer(learner: Learner, processes: Processes, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """AdamW, and how the loop adds gradients up and clips them where that is not torch's way."""
    trained = learner.parameters.values()
    optimizer = torch.optim.AdamW(trained, lr=options["lr"], weight_decay=options["weight_decay"])
    if not processes.deepspeed:
        return optimizer, {}
    clip = options["clip"] or None
    zero = Zero(learner.network, optimizer, processes.deepspeed, count=processes.count, clip=clip)
    return zero, {"backward": zero.backward, "clip_norm": zero.norm}


def _settings(
    options: dict[str, Any],
    learner: Learner,
    lesson: Lesson,
    grid: BaseGrid | None,
    given: Adapter | None,
    autocast: bool,
) -> dict[str, Any]:
    """What a resumed run must share with its beginning."""
    return {name: options[name] for name in _KEPT} | {
        "base": learner.base_digest, "data": file_sha256(Path(options["data"])), "targets": list(learner.marks),
        "tokens": digest(lesson.items),
        "eval_data": file_sha256(Path(options["eval_data"])) if options["eval_data"] else None,
        "max_length": lesson.max_length, "labels": lesson.labels, "autocast": autocast,
        "base_quantization": grid and grid.to_json(),
        "init_adapter": given and given.path and file_sha256(given.path / WEIGHTS),
        **({"repair_base": True} if options["repair_base"] else {}),
    }  # fmt: skip
