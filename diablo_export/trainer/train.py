"""The verb `train`: a base model and a data file in, an adapter folder out.

While it runs, its log and its last checkpoint lie in `<output>.training`, from where `resume` continues; the adapter
folder appears whole when the run is done.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diablo_export.adapter import TASKS, WEIGHTS, AdaptedModule, Adapter, file_sha256, stored_transposed
from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log
from diablo_export.errors import CheckpointError, InputError, require
from diablo_export.fingerprint import Fingerprint, fingerprint
from diablo_export.output import new_folder
from diablo_export.trainer.batches import Batches, hold_out
from diablo_export.trainer.data import read_examples
from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.history import LOG, PICTURE, History, draw, training_bar, write_log
from diablo_export.trainer.initial import begin_at, begin_at_float
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.loop import learning_rate, train_loop
from diablo_export.trainer.model import checkpoint_activations, head_parameters, load_with_fresh
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.on_grid import hardening, put_on_grid, settle
from diablo_export.trainer.options import check_options, check_places, choose_device, use_bfloat16, work_folder
from diablo_export.trainer.plan import make_plan, memory_advice
from diablo_export.trainer.prepare import base_dtype, encode_file, item_length, known_classes, open_base
from diablo_export.trainer.processes import join_processes, whole
from diablo_export.trainer.quantized import pack_base
from diablo_export.trainer.repair import begin_repaired
from diablo_export.trainer.state import CHECKPOINT, STATE, load_state, save_state
from diablo_export.trainer.targets import ALL, choose_targets, short_names, wrap_targets
from diablo_export.trainer.tensorboard import event_files
from diablo_export.trainer.watch import Watch, interrupts, workspace

# options that a resumed run must share with its beginning, beside those that are worked out from several
_KEPT = (
    "task", "num_blocks", "lr", "batch_size", "grad_accumulation", "schedule", "weight_decay", "clip", "seed",
    "eval_fraction",
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
    processes = join_processes(device, batch_size, packed=base_quantize != "none")
    output, work, place = Path(output), work_folder(Path(output)), choose_device(device)
    autocast = use_bfloat16(dtype, place)
    if tensorboard:
        require("tensorboard", "tensorboard")
    if processes.first and not dry_run:
        check_places(output, work, resume, overwrite)
    processes.wait()
    grid = BaseGrid.chosen(base_quantize, group_size, asymmetric, task == "text-classification", on_grid)

    checkpoint = open_base(model)
    given = None if init_adapter is None else Adapter.load(init_adapter)
    if given is not None:
        given.check_base(checkpoint)
        target_modules, num_blocks = target_modules or list(given.modules), num_blocks or given.num_blocks
    options["num_blocks"] = num_blocks = num_blocks or 64
    examples = read_examples(data)
    classes = known_classes(examples, data, checkpoint, task)
    labels = None if classes is None else [str(name) for name in classes]
    torch.manual_seed(seed)
    network, tokenizer, fresh = load_with_fresh(
        model, task, dtype=base_dtype(checkpoint, autocast), device="cpu" if grid else place, labels=labels
    )
    max_length = item_length(network, max_length)
    how = {"tokenizer": tokenizer, "max_length": max_length, "classes": classes}
    running = classes is None and examples[0].form == "text"
    items, held = hold_out(encode_file(data, examples, **how), eval_fraction, seed, running)
    if eval_data:
        held = encode_file(eval_data, read_examples(eval_data), **how)

    head = [] if classes is None else head_parameters(network, fresh)
    names, marks = _adapt(network, checkpoint, head, target_modules, num_blocks)
    if grid is not None:
        size = pack_base(network, grid, leave={name.rpartition(".")[0] for name in head})
        log.info("base in %s: %.1f MB", grid, size / 1e6)
        network.to(place)
    if on_grid:
        if processes.sharded:
            raise InputError("--on-grid does not go with FSDP, which cuts blocks in pieces; start without it")
        put_on_grid(network)
    parameters = _trainable(network, head)
    if given is not None:
        begin_at(network, parameters, given, checkpoint, given.base_grid if on_grid else grid)
    if on_grid and not repair_base:
        begin_at_float(network, checkpoint)
    if repair_base and not (resume and (work / CHECKPOINT / STATE).exists()):
        begin_repaired(network, checkpoint, items, batch_size, tokenizer.pad_token_id or 0)
    if processes.sharded:
        processes.spread(network)
        parameters = _trainable(network, head)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
    if gradient_checkpointing:
        checkpoint_activations(network)
    if not autocast and not processes.sharded:
        fold_blocks(diablo_layers(network).values())

    batches = Batches(items, batch_size, grad_accumulation, seed)
    steps = max_steps or math.ceil(epochs * batches.steps_per_epoch)
    warmup = math.ceil(steps / 20) if warmup_steps is None else min(steps, warmup_steps)
    objective = Objective(network, classes is not None, tokenizer.pad_token_id or 0, place, autocast, processes)
    settings = {name: options[name] for name in _KEPT} | {
        "base": _digest(marks), "data": file_sha256(Path(data)), "targets": list(marks), "steps": steps,
        "warmup_steps": warmup, "max_length": max_length, "labels": labels, "autocast": autocast,
        "base_quantization": grid and grid.to_json(), "init_adapter": given and _sha256(given),
    }  # fmt: skip
    settings |= {"repair_base": True} if repair_base else {}
    start, records = 0, list[dict[str, Any]]()
    if resume and (work / CHECKPOINT / STATE).exists():
        start, records = load_state(work / CHECKPOINT, parameters, optimizer, settings)
        log.info("continuing after step %d of %d", start, steps)
    size = sum(parameter.numel() for parameter in parameters.values())
    log.info(
        "training %s parameters in %d modules on %s: %s items, %d steps of %d × %d",
        f"{size:,}", len(marks), place.type, f"{len(items):,}", steps, batch_size, grad_accumulation,
    )  # fmt: skip

    trained = list(parameters.values())
    run = functools.partial(
        train_loop, optimizer, batches=batches, loss=objective.loss, targets=objective.targets,
        rate=learning_rate(lr, steps, warmup, schedule), clip=clip or None, seed=seed + (processes.rank << 32),
        culprit=objective.culprit, add_up=processes.add_up,
    )  # fmt: skip
    if dry_run:
        network.train()
        plan = make_plan(objective, trained, batches, steps=steps, try_steps=run)
        return Training(output, steps, size, math.nan, [], plan)

    with (
        workspace(work) if processes.first else contextlib.nullcontext(),
        _deterministic(place), interrupts(processes.count > 1) as interrupted, training_bar(steps, start) as show,
        event_files(Path(tensorboard) if tensorboard and processes.first else None, start) as also,
        memory_advice(objective, trained, batches),
    ):  # fmt: skip
        history = History(work / LOG if processes.first else Path(os.devnull), records, also)

        def save(step: int) -> None:
            save_state(
                work / CHECKPOINT, parameters, optimizer, step=step, settings=settings, log=history.records,
                write=processes.first,
            )  # fmt: skip
            processes.wait()

        tenth = math.ceil(steps / 10)
        watch = Watch(
            objective, held, batch_size, steps, eval_every or tenth, checkpoint_every or max(25, tenth),
            history, show, save, lambda: processes.any(interrupted()),
        )  # fmt: skip
        if start == 0:
            watch.evaluate(0)
        network.train()
        after_step = hardening(network, steps, start, watch) if on_grid else watch
        run(steps=steps, start=start, after_step=after_step)
        settle(network)
        adapter = Adapter(
            _modules(network, marks), TASKS[task], _base_name(model), num_blocks, names,
            {name: whole(parameters[name].detach()).cpu().numpy() for name in head}, labels or [], base_grid=grid,
        )  # fmt: skip
        if processes.first:
            _write(output, overwrite, adapter, history, f"{Path(model).name} on {Path(data).name}, lr {lr:g}")
        processes.wait()
    evaluations = [record for record in history.records if "eval_loss" in record]
    return Training(output, steps, size, history.column("loss")[1][-1], evaluations)


def _write(output: Path, overwrite: bool, adapter: Adapter, history: History, title: str) -> None:
    with new_folder(output, overwrite=overwrite) as folder:
        adapter.save(folder)
        write_log(folder / LOG, history.records)
        draw(history, folder / PICTURE, f"{title}, {adapter.num_blocks} blocks")
    log.info("wrote %s", output)


def _adapt(
    network: nn.Module,
    checkpoint: Checkpoint,
    head: Sequence[str],
    target_modules: str | Sequence[str] | None,
    num_blocks: int,
) -> tuple[list[str], dict[str, Fingerprint]]:
    """Put zero blocks beside the targets; their names for the adapter's config, and each one's base weight's mark."""
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    targets = choose_targets(network, wanted, exclude={name.rpartition(".")[0] for name in head})
    marks = _fingerprints(checkpoint, targets)
    wrap_targets(network, targets, num_blocks)
    return short_names(network, targets) if not wanted or ALL in wanted else wanted, marks


def _base_name(model: str | Path) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def _fingerprints(checkpoint: Checkpoint, targets: Sequence[str]) -> dict[str, Fingerprint]:
    """The fingerprint of each target's weight as the checkpoint stores it, read one at a time."""
    found, absent = {}, []
    for name in targets:
        info = checkpoint.find(f"{name}.weight")
        if info is None:
            absent.append(name)
            continue
        weight = info.read()
        found[name] = fingerprint(weight.T if stored_transposed(checkpoint.config) else weight)
    if absent:
        raise CheckpointError(
            f"{checkpoint.folder}: stores these modules under other names than the loaded model has, so that blocks "
            f"could not be merged into them: {', '.join(absent[:5])}; choose other --target-modules"
        )
    return found


def _sha256(adapter: Adapter) -> str:
    assert adapter.path is not None
    return file_sha256(adapter.path / WEIGHTS)


def _digest(marks: dict[str, Fingerprint]) -> str:
    return hashlib.sha256("".join(mark.xxh3_128 for mark in marks.values()).encode()).hexdigest()


def _trainable(network: Any, head: Sequence[str]) -> dict[str, nn.Parameter]:
    """What is trained, by name: blocks and head, in float32."""
    network.config.use_cache = False
    named = dict(network.named_parameters())
    for name in head:
        named[name].data = named[name].data.float()
        named[name].requires_grad_(True)
    blocks = {f"{name}.diablo_blocks": layer.blocks for name, layer in diablo_layers(network).items()}
    return blocks | {name: named[name] for name in head}


def _modules(network: nn.Module, marks: dict[str, Fingerprint]) -> dict[str, AdaptedModule]:
    return {
        name: AdaptedModule(
            name,
            whole(layer.blocks.detach()).cpu().numpy(),
            layer.shape.in_features,
            layer.shape.out_features,
            marks[name],
        )
        for name, layer in diablo_layers(network).items()
    }


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
