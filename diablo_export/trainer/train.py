"""The verb `train`: a base model and a data file in, an adapter folder out.

While it runs, its log and its last checkpoint lie in `<output>.training`, from where `resume` continues; the adapter
folder appears whole when the run is done.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.console import log
from diablo_export.errors import require
from diablo_export.output import keep_inputs, new_folder
from diablo_export.trainer.history import LOG, PICTURE, History, draw, write_log
from diablo_export.trainer.on_grid import hardening, settle
from diablo_export.trainer.options import check_options, check_places, choose_device, work_folder
from diablo_export.trainer.packed_base import is_packed
from diablo_export.trainer.plan import make_plan, memory_advice
from diablo_export.trainer.prepare import open_base
from diablo_export.trainer.processes import join_processes
from diablo_export.trainer.run import Run, make_run
from diablo_export.trainer.state import CHECKPOINT, load_state, save_state, unfinished
from diablo_export.trainer.watch import Watch, watching


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
    if processes.first and not dry_run:
        keep_inputs(output, model, data, eval_data, init_adapter)
        check_places(output, work, resume, overwrite)
    processes.wait()
    going_on = resume and unfinished(work)
    run = make_run(checkpoint, grid, processes, place, options, anew=not going_on)
    if resume and not going_on:
        log.info("%s holds no checkpoint to resume from: beginning at the first step", work)
    start, records = _resumed(run, work) if going_on else (0, [])
    run.tell(batch_size * grad_accumulation)
    network = run.learner.network
    network.train()
    if dry_run:
        plan = make_plan(run.objective, run.trained, run.batches, steps=run.steps, try_steps=run.loop)
        return Training(output, run.steps, run.size, math.nan, [], plan)
    with _deterministic(place), _watching(run, work, start, records, options) as watch:
        if start == 0:
            watch.evaluate(0)
        after = hardening(network, run.steps, start, watch) if on_grid else watch
        run.loop(steps=run.steps, start=start, after_step=after)
        settle(network)
        adapter, history = run.learner.adapter(model, task, run.lesson.labels, grid), watch.history
        if processes.first:
            if not on_grid:  # where moves of less than a step are none
                _tell_zeros(adapter)
            _write(output, overwrite, adapter, history, f"{Path(model).name} on {Path(data).name}, lr {lr:g}")
        processes.wait()
    evaluations = [record for record in history.records if "eval_loss" in record]
    return Training(output, run.steps, run.size, history.column("loss")[1][-1], evaluations)


def _resumed(run: Run, work: Path) -> tuple[int, list[dict[str, Any]]]:
    """Put a run where its checkpoint is; its finished steps and its log."""
    start, records = load_state(work / CHECKPOINT, run.learner.parameters, run.optimizer, run.settings)
    log.info("continuing after step %d of %d", start, run.steps)
    return start, records


@contextlib.contextmanager
def _watching(
    run: Run, work: Path, start: int, records: list[dict[str, Any]], options: dict[str, Any]
) -> Iterator[Watch]:
    """What follows each step, while the folder of the unfinished run is there; memory that runs out is told."""
    processes = run.objective.processes

    def save(step: int, log: list[dict[str, Any]]) -> None:
        how: dict[str, Any] = {"step": step, "settings": run.settings, "log": log, "write": processes.first}
        save_state(work / CHECKPOINT, run.learner.parameters, run.optimizer, **how)
        processes.wait()

    tensorboard = Path(options["tensorboard"]) if options["tensorboard"] else None
    with (
        watching(
            work, run.objective, run.lesson.held, save, steps=run.steps, start=start, records=records,
            batch_size=options["batch_size"], eval_every=options["eval_every"],
            save_every=options["checkpoint_every"], tensorboard=tensorboard,
        ) as watch,
        memory_advice(run.objective, run.trained, run.batches),
    ):  # fmt: skip
        yield watch


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
