"""The verb `sweep`: methods × learning rates × block counts × targets × seeds, compared on held-out data.

While it runs, the results so far lie in `<output>.sweep`, one line for each finished trial; `resume` goes on from
there, and also widens a finished sweep. The output folder appears whole when all trials are done.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diablo_export.adapter import file_sha256
from diablo_export.checkpoint import Checkpoint, read_json
from diablo_export.console import log, progress
from diablo_export.errors import DataError, InputError, OutputError, require
from diablo_export.manifest import base_sha256, file_xxh3
from diablo_export.output import check_output, full_disk_said, keep_inputs, new_folder
from diablo_export.trainer.baselines import BASE, METHODS
from diablo_export.trainer.history import write_log
from diablo_export.trainer.options import check_options, choose_device
from diablo_export.trainer.packed_base import is_packed
from diablo_export.trainer.prepare import open_base
from diablo_export.trainer.state import FORMAT_VERSION, check_settings
from diablo_export.trainer.sweep_report import draw, label, table
from diablo_export.trainer.workers import run_all

RESULTS, SETTINGS, TABLE, PICTURE = "results.jsonl", "sweep.json", "table.md", "sweep.png"
DIABLO = "diablo"
_BESIDE = ("config.json", "tokenizer", "vocab", "merges", "spiece", "special_tokens", "added_tokens", "chat_template")
_KEY = ("method", "lr", "num_blocks", "target_modules", "seed")


def sweep(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    methods: Sequence[str] = ("diablo", "lora", "full"),
    lr: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    num_blocks: Sequence[int] = (64,),
    target_modules: Sequence[Sequence[str]] = (),
    seeds: Sequence[int] = (0,),
    task: str = "causal-lm",
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
    eval_data: str | Path | None = None,
    eval_fraction: float = 0.0,
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Train every combination in the same loop on the same data, and draw held-out loss against learning rate.

    Args:
        model: Hugging Face folder or id of the base.
        data: JSON Lines or .txt, as for `train`.
        output: the folder; gets results.jsonl, table.md, sweep.png and sweep.json.
        methods: names in `baselines.METHODS`.
        lr: peak learning rates.
        num_blocks: block counts; LoRA gets the rank with as many parameters.
        target_modules: sets of targets, each as `choose_targets` takes them; none: its default.
        seeds: a trial each; the lines held out are the same for all.
        jobs: trials at a time, in processes of their own; None: one for each GPU, one on a CPU.
        resume: go on with an unfinished sweep, or widen a finished one; trials that are done are not repeated.
        overwrite: replace an existing output, and drop an unfinished sweep.

    The other options are those of `train`, and shared by all trials.

    Returns:
        one result for each trial, see `trial`, with its method, lr, num_blocks, target_modules and seed.

    Raises:
        InputError: bad options, data, model or output, or every trial diverged.
    """
    methods, lr, num_blocks, seeds = map(_several, (methods, lr, num_blocks, seeds))
    options = dict(locals())
    _check(options)
    require("matplotlib", "train")
    if {"lora", "dora"} & set(methods):
        require("peft", "peft")
    _check_methods(model, methods)
    output, work, place = Path(output), Path(f"{os.path.abspath(output)}.sweep"), choose_device(device)
    keep_inputs(output, model, data, eval_data)
    _check_places(output, work, resume, overwrite)
    sets: list[list[str] | None] = [_several(names) for names in _several(target_modules)] or [None]
    wanted = cells(methods, lr, num_blocks, sets, seeds, with_base=task == "causal-lm")
    grid = {*_KEY, "methods", "seeds", "output", "jobs", "device", "resume", "overwrite"}
    shared = {name: value for name, value in options.items() if name not in grid}
    settings = shared | {"format_version": FORMAT_VERSION, "model": str(model), "data": file_sha256(Path(data))}
    settings["base"] = _base_digest(Checkpoint.open(model))
    settings["eval_data"] = file_sha256(Path(eval_data)) if eval_data else None

    finished = _so_far([output, work] if resume else [], settings)
    known = {_key(result) for result in finished}
    left = [cell for cell in wanted if _key(cell) not in known]
    if len(left) < len(wanted):
        log.info("%d of %d trials are done already", len(wanted) - len(left), len(wanted))
    with _workspace(work, settings):
        finished += _run(left, {**shared, "place": place}, jobs, work, settings, anew=not resume)
    trained = [result for result in finished if result["method"] != BASE]
    if all("diverged" in result for result in trained):
        raise InputError(f"every trial diverged; go on with --resume and a lower --lr. {trained[0]['diverged']}")

    title = f"{Path(model).name} on {Path(data).name}"
    with new_folder(output, overwrite=overwrite or resume) as folder:
        write_log(folder / RESULTS, finished)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        (folder / TABLE).write_text(table(finished), encoding="utf-8")
        draw(finished, folder / PICTURE, title)
    shutil.rmtree(work, ignore_errors=True)
    log.info("wrote %s", output)
    return finished


def _base_digest(checkpoint: Checkpoint) -> str:
    """Of all that a trial reads of the base: its weights, configuration and tokenizer."""
    beside = [file for file in checkpoint.folder.iterdir() if file.name.startswith(_BESIDE)]
    return base_sha256({file.name: file_xxh3(file) for file in {*checkpoint.files, *beside} if file.is_file()})


def _several(values: Any) -> list[Any]:
    """What is given as a list, as one value, or as numpy has it, as a list."""
    values = getattr(values, "tolist", lambda: values)()
    return [values] if isinstance(values, str | int | float) else list(values)


def cells(
    methods: Sequence[str],
    lrs: Sequence[float],
    counts: Sequence[int],
    targets: Sequence[list[str] | None],
    seeds: Sequence[int],
    with_base: bool,
) -> list[dict[str, Any]]:
    """The trials of a grid, each once: a whole grid of one seed before the next, and `full` has no blocks to vary."""
    base = [(BASE, None, None, None, 0)] if with_base else []
    grid = [
        (method, lr, None, None, seed) if method == "full" else (method, lr, count, names, seed)
        for seed, method, count, names, lr in itertools.product(seeds, methods, counts, targets, lrs)
    ]
    each = {_key(cell): cell for cell in (dict(zip(_KEY, values, strict=True)) for values in [*base, *grid])}
    return list(each.values())


def _run(
    left: Sequence[dict[str, Any]],
    options: dict[str, Any],
    jobs: int | None,
    work: Path,
    settings: dict[str, Any],
    anew: bool,
) -> list[dict[str, Any]]:
    """Run trials, each kept in `work` as it ends; begun `anew`, the first one replaces what an older sweep left."""
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    with progress("sweep", len(left)) as advance:
        for cell, outcome in run_all(left, options, jobs):
            results.append({**cell, **outcome})
            _keep(results[-1], work, settings, anew=anew and len(results) == 1)
            advance(1)
            rest = (time.perf_counter() - began) / len(results) * (len(left) - len(results))
            log.info("%d of %d: %s; %s left", len(results), len(left), _say(results[-1]), _duration(rest))
    return results


def _keep(result: dict[str, Any], work: Path, settings: dict[str, Any], anew: bool) -> None:
    """Add a result to those of an unfinished sweep, or begin them with it."""
    if anew:
        (work / RESULTS).unlink(missing_ok=True)
        (work / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    with (work / RESULTS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _say(result: dict[str, Any]) -> str:
    rate = "" if result["lr"] is None else f", lr {result['lr']:g}, seed {result['seed']}"
    if "diverged" in result:
        return f"{label(result)}{rate}: diverged"
    accuracy = f", accuracy {result['eval_accuracy']:.4f}" if "eval_accuracy" in result else ""
    return f"{label(result)}{rate}: held-out loss {result['eval_loss']:.4f}{accuracy}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _key(cell: dict[str, Any]) -> str:
    return json.dumps([cell[name] for name in _KEY])


def _check(options: dict[str, Any]) -> None:
    """Check all options, those that are lists value by value; raises InputError."""
    check_options({name: value for name, value in options.items() if name not in ("lr", "num_blocks")})
    for name in ("methods", "lr", "num_blocks", "seeds"):
        if not options[name]:
            raise InputError(f"--{name.replace('_', '-')} is empty; give one value at least")
    for name, one in (("lr", "lr"), ("num_blocks", "num_blocks"), ("seeds", "seed")):
        for value in options[name]:
            check_options({one: value})
    unknown = [name for name in options["methods"] if name not in METHODS]
    if unknown:
        raise InputError(f"--methods has {', '.join(map(repr, unknown))}; known are {', '.join(METHODS)}")
    for file in filter(None, (options["data"], options["eval_data"])):
        if not Path(file).is_file():
            raise DataError(f"{file}: no such file; give a .jsonl or .txt file")
    if not options["eval_data"] and not options["eval_fraction"]:
        raise InputError("a sweep compares on held-out data: give --eval-data or --eval-fraction")
    if options["jobs"] is not None and options["jobs"] < 1:
        raise InputError(f"--jobs is {options['jobs']}; it must be at least 1")


def _check_methods(model: str | Path, methods: Sequence[str]) -> None:
    """Beside packed weights there are blocks; other methods change float weights, or know PEFT's layers only."""
    others = [name for name in methods if name != DIABLO]
    if others and is_packed(open_base(model)):
        raise InputError(
            f"{model}: is quantized, and --methods has {', '.join(others)}, which train on float weights only: give "
            f"--methods {DIABLO}, or the float model"
        )


def _check_places(output: Path, work: Path, resume: bool, overwrite: bool) -> None:
    """Refuse an output or unfinished sweep that would be lost."""
    check_output(output, overwrite or resume)
    if work.exists() and not (resume or overwrite):
        raise OutputError(f"{work}: holds an unfinished sweep; go on with --resume, or start anew with --overwrite")


def _so_far(folders: Sequence[Path], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a finished and of an unfinished sweep of the same settings, each once."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if (folder / RESULTS).exists():
            check_settings(folder, read_json(folder / SETTINGS), settings)
            found |= {_key(result): result for result in read_results(folder / RESULTS)}
    return list(found.values())


@contextlib.contextmanager
def _workspace(work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The folder of an unfinished sweep; it stays when that is stopped with results, and goes when it has none."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk_said(work, "finished trials stay, to --resume from"):
            if not (work / RESULTS).exists():  # a kill while they are written again would leave none beside results
                (work / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
            yield
    except BaseException:
        if not (work / RESULTS).exists() or not (work / RESULTS).stat().st_size:
            shutil.rmtree(work, ignore_errors=True)
        raise


def read_results(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a results file; half a line that a kill left is cut off."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    return [json.loads(line) for line in content[:whole].splitlines()]
