"""The verb `train`: a base model and a data file in, an adapter folder out.

While it runs, its log and its last checkpoint lie in `<output>.training`, from where `resume` continues; the adapter
folder appears whole when the run is done.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diablo_export.adapter import WEIGHTS, Adapter, file_sha256
from diablo_export.base_grid import BaseGrid
from diablo_export.console import log
from diablo_export.errors import require
from diablo_export.output import keep_inputs, new_folder
from diablo_export.packed.modules import check_base
from diablo_export.trainer.batches import Batches, digest
from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.history import LOG, PICTURE, History, draw, write_log
from diablo_export.trainer.initial import begin
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.learner import Learner, owners, put_blocks
from diablo_export.trainer.loop import learning_rate, train_loop, warm_up
from diablo_export.trainer.model import checkpoint_activations
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.on_grid import hardening, lay_base, settle
from diablo_export.trainer.options import check_options, check_places, choose_device, use_bfloat16, work_folder
from diablo_export.trainer.packed_base import is_packed
from diablo_export.trainer.plan import make_plan, memory_advice
from diablo_export.trainer.prepare import Lesson, open_base, prepare
from diablo_export.trainer.processes import join_processes
from diablo_export.trainer.state import CHECKPOINT, load_state, save_state, unfinished
from diablo_export.trainer.watch import watching
from diablo_export.trainer.zero import Zero

# options that a resumed run must share with its beginning, beside those that are worked out from several
_KEPT = (
    "task", "num_blocks", "lr", "batch_size", "grad_accumulation", "schedule", "weight_decay", "clip", "seed",
    "eval_fraction", "steps", "warmup_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What a finished run came to."""

    output: Path
    steps: int
    parameters: int  # trained
    loss: float  # of the last step
    evaluations: list[dict[str, Any]]  # {"step", "eval_loss"} and a classifier's "eval_accuracy", in order
    plan: dict[str, Any] | None = None  # of a dry run, which trains nothing: see `make_plan`


def train(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    task: str = "causal-lm",
    num_blocks: int | None = None,
    target_modules: str | Sequence[str] | None = None,
    lr: float = 5e-4,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 16,
    grad_accumulation: int = 1,
    max_length: int | None = None,
    schedule: str = "linear",
    warmup_steps: int | None = None,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    dtype: str = "auto",
    device: str = "auto",
    gradient_checkpointing: bool = False,
    base_quantize: str = "none",
    group_size: int | None = None,
    asymmetric: bool | None = None,
    on_grid: bool = False,
    init_adapter: str | Path | None = None,
    repair_base: bool = False,
    eval_data: str | Path | None = None,
    eval_fraction: float = 0.0,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: str | Path | None = None,
    dry_run: bool = False,
) -> Training:
    """Train DiaBlo blocks on a frozen model and write them as an adapter folder.

    Args:
        model: Hugging Face folder or id of the base.
        data: JSON Lines or .txt, see `diablo_export.trainer.data`.
        output: the adapter folder; also gets training.jsonl and loss.png.
        task: `causal-lm` or `text-classification`.
        num_blocks: diagonal blocks per module; a module of m × n weights gets m · n / num_blocks parameters. None: 64,
            or as many as `init_adapter` has.
        target_modules: see `choose_targets`; None: those of `init_adapter`, if there is one.
        lr: peak learning rate.
        epochs: passes over the data, also a fraction; `max_steps` wins over it.
        max_steps: steps of the optimizer in all.
        batch_size: items per batch; `grad_accumulation` batches make a step.
        grad_accumulation: batches per step.
        max_length: tokens per item, or per packed piece of running text; None: 512, or what the model takes when less.
        schedule: `linear` or `cosine` to zero, or `constant`, after `warmup_steps`.
        warmup_steps: steps in which the learning rate rises; None: a twentieth of all.
        weight_decay: of AdamW, on blocks and head: pulls the model towards its base.
        clip: largest norm of the gradient; 0 for none.
        dtype: `float32`, or `bfloat16`: matrix products in bfloat16 while the base keeps its checkpoint's precision
            and blocks, head and optimizer are float32. `auto`: bfloat16 on a GPU that has it, else float32.
        device: `auto`, `cpu` or `cuda`.
        gradient_checkpointing: compute activations again in the backward pass rather than keep them.
        base_quantize: int8, int4 or int2: train beside the weights that `export --quantize` ships, kept packed.
        group_size: input positions that share a scale, when quantizing; None: what `base_grid.usual` says of the task.
        asymmetric: a zero point for each group, when quantizing; None: likewise.
        on_grid: the blocks move the codes of the quantized base, and a merge into it is exact.
        init_adapter: adapter folder to begin from, for the same base.
        repair_base: begin at the blocks that take back most of what quantizing did to each layer's output.
        eval_data: held-out file.
        eval_fraction: hold out this share of `data` instead: the end of running text, else lines at random.
        eval_every: steps between evaluations; None: a tenth of the run.
        checkpoint_every: steps between checkpoints; None: a tenth of the run, 25 at least.
        seed: of the fresh head, the order of the data, dropout, and the lines held out.
        resume: continue an unfinished run of the same settings, to the very weights it would have come to.
        overwrite: replace an existing output, and drop an unfinished run.
        tensorboard: folder to write TensorBoard's event files to, beside training.jsonl.
        dry_run: load model and data, work out what the run will take, time two steps, and write nothing.

    Raises:
        InputError: bad options, data, model or output, or a loss that became NaN.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    options = dict(locals())
    check_options(options)
    require("matplotlib", "train")  # rather now than after hours of training
    if tensorboard:
        require("tensorboard", "tensorboard")
    grid = BaseGrid.chosen(base_quantize, group_size, asymmetric, task == "text-classification", on_grid)
    checkpoint = open_base(model, grid)
    processes = join_processes(device, batch_size, packed=grid is not None or is_packed(checkpoint))
    output, work, place = Path(output), work_folder(Path(output)), choose_device(device)
    autocast = use_bfloat16(dtype, place)
    if processes.first and not dry_run:
        keep_inputs(output, model, data, eval_data, init_adapter)
        check_places(output, work, resume, overwrite)
    processes.wait()
    going_on = resume and unfinished(work)

    given = None
    if init_adapter is not None:
        given = Adapter.load(init_adapter)
        check_base(checkpoint, given)
        target_modules, num_blocks = target_modules or list(given.modules), num_blocks or given.num_blocks
    torch.manual_seed(seed)  # of a fresh head
    lesson = prepare(
        checkpoint, data, task=task, autocast=autocast, device="cpu" if grid else place, max_length=max_length,
        eval_data=eval_data, eval_fraction=eval_fraction, seed=seed,
    )  # fmt: skip
    network = lesson.network
    learner = put_blocks(network, lesson.head, checkpoint, target_modules, num_blocks or 64)
    if grid is not None:
        lay_base(network, grid, leave=owners(lesson.head))
        network.to(place)
    if not going_on:
        begin(learner, lesson, checkpoint, given=given, grid=grid, repair=repair_base, batch_size=batch_size)
    processes.spread(network)
    if gradient_checkpointing:
        checkpoint_activations(network)
    if not (autocast or processes.sharded or processes.deepspeed):
        fold_blocks(diablo_layers(network).values())

    trained = list(learner.parameters.values())
    optimizer: Any = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    by: dict[str, Any] = {}  # how gradients are added up and clipped, where that is not torch's way
    if processes.deepspeed:
        optimizer = Zero(network, optimizer, processes.deepspeed, count=processes.count, clip=clip or None)
        by = {"backward": optimizer.backward, "clip_norm": optimizer.norm}
    objective = Objective(network, lesson.labels is not None, lesson.pad, place, autocast, processes)
    batches = Batches(lesson.items, batch_size, grad_accumulation, seed)
    steps = max_steps or math.ceil(epochs * batches.steps_per_epoch)
    warmup = warm_up(steps, warmup_steps)
    options |= {"num_blocks": learner.num_blocks, "steps": steps, "warmup_steps": warmup}
    settings = _settings(options, learner, lesson, grid, given, autocast)
    start, records = 0, list[dict[str, Any]]()
    if resume and not going_on:
        log.info("%s holds no checkpoint to resume from: beginning at the first step", work)
    if going_on:
        start, records = load_state(work / CHECKPOINT, learner.parameters, optimizer, settings)
        log.info("continuing after step %d of %d", start, steps)
    size = sum(parameter.numel() for parameter in trained)
    log.info(
        "training %s parameters in %d modules on %s: %s items, %d step%s of %d", f"{size:,}", len(learner.marks),
        place.type, f"{len(lesson.items):,}", steps, "s" * (steps != 1), batch_size * grad_accumulation,
    )  # fmt: skip

    run = functools.partial(
        train_loop, optimizer, batches=batches, loss=objective.loss, targets=objective.targets,
        rate=learning_rate(lr, steps, warmup, schedule), clip=clip or None, seed=seed + (processes.rank << 32),
        culprit=objective.culprit, add_up=processes.add_up, **by,
    )  # fmt: skip
    if dry_run:
        network.train()
        plan = make_plan(objective, trained, batches, steps=steps, try_steps=run)
        return Training(output, steps, size, math.nan, [], plan)

    def save(step: int, records: list[dict[str, Any]]) -> None:
        save_state(
            work / CHECKPOINT, learner.parameters, optimizer, step=step, settings=settings, log=records,
            write=processes.first,
        )  # fmt: skip
        processes.wait()

    with (
        _deterministic(place),
        watching(
            work, objective, lesson.held, save, steps=steps, start=start, records=records, batch_size=batch_size,
            eval_every=eval_every, save_every=checkpoint_every, tensorboard=Path(tensorboard) if tensorboard else None,
        ) as watch,
        memory_advice(objective, trained, batches),
    ):  # fmt: skip
        if start == 0:
            watch.evaluate(0)
        network.train()
        run(steps=steps, start=start, after_step=hardening(network, steps, start, watch) if on_grid else watch)
        settle(network)
        adapter, history = learner.adapter(model, task, lesson.labels, grid), watch.history
        if processes.first:
            if not on_grid:  # where moves of less than a step are none
                _tell_zeros(adapter)
            _write(output, overwrite, adapter, history, f"{Path(model).name} on {Path(data).name}, lr {lr:g}")
        processes.wait()
    evaluations = [record for record in history.records if "eval_loss" in record]
    return Training(output, steps, size, history.column("loss")[1][-1], evaluations)


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


def _write(output: Path, overwrite: bool, adapter: Adapter, history: History, title: str) -> None:
    with new_folder(output, overwrite=overwrite) as folder:
        adapter.save(folder)
        write_log(folder / LOG, history.records)
        draw(history, folder / PICTURE, f"{title}, {adapter.num_blocks} blocks")
    log.info("wrote %s", output)


def _tell_zeros(adapter: Adapter) -> None:
    zero = [name for name, module in adapter.modules.items() if not module.blocks.any()]
    if zero:
        log.warning(
            "the blocks of %d of %d modules are zero still: nothing of the data reached %s", len(zero),
            len(adapter.modules), ", ".join(zero[:5]) + ", …" * (len(zero) > 5),
        )  # fmt: skip


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, ask for kernels that give the same bits every time: resuming relies on it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS asks for
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
