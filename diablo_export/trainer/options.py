"""The options of a training run, checked before anything is loaded."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from diablo_export.adapter import TASKS
from diablo_export.errors import InputError, OutputError
from diablo_export.output import check_output
from diablo_export.trainer.loop import SCHEDULES
from diablo_export.trainer.state import CHECKPOINT, read_step, unfinished

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
_CHOICES = {"task": tuple(TASKS), "schedule": SCHEDULES, "dtype": DTYPES, "device": DEVICES}
_OPTIONAL = {"num_blocks", "max_steps", "max_length", "warmup_steps", "eval_every", "checkpoint_every"}
_WHOLE = _OPTIONAL | {"batch_size", "grad_accumulation", "seed"}
# option → what it must be, and whether a value is
_LIMITS: dict[str, tuple[str, float, float]] = {
    # lowest, highest allowed; bounds of open intervals are the next number inside
    "num_blocks": (", at least 1", 1, math.inf),
    "lr": (" above 0, at most 1e30", 5e-324, 1e30),  # float32 ends at 3e38, and AdamW begins with ten times as much
    "epochs": (" above 0", 5e-324, math.inf),
    "max_steps": (", at least 1", 1, math.inf),
    "batch_size": (", at least 1", 1, math.inf),
    "grad_accumulation": (", at least 1", 1, math.inf),
    "max_length": (", at least 2", 2, math.inf),
    "warmup_steps": (", at least 0", 0, math.inf),
    "weight_decay": (", at least 0", 0, math.inf),
    "clip": (", at least 0", 0, math.inf),
    "eval_fraction": (", at least 0 and below 1", 0, math.nextafter(1, 0)),
    "eval_every": (", at least 1", 1, math.inf),
    "checkpoint_every": (", at least 1", 1, math.inf),
    "seed": (", at least 0 and below 2^62", 0, 2**62 - 1),
}


def check_options(options: dict[str, Any]) -> None:
    """Check values by option name; None is no value.

    Raises:
        InputError: lists every option that is out of its range.
    """
    faults = []
    for name, value in options.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            faults.append(f"{flag(name)} is {value!r}; it must be one of {', '.join(_CHOICES[name])}")
        if name in _LIMITS and not (value is None and name in _OPTIONAL):
            words, low, high = _LIMITS[name]
            # not numpy's whole numbers, which JSON does not know: it is written hours later
            is_number = isinstance(value, int if name in _WHOLE else int | float) and not isinstance(value, bool)
            if not (is_number and low <= value <= high and math.isfinite(value)):
                kind = "whole number" if name in _WHOLE else "number"
                faults.append(f"{flag(name)} is {value!r}; it must be a {kind}{words}")
    if options.get("eval_data") and options.get("eval_fraction"):
        faults.append("both --eval-data and --eval-fraction are given; choose one")
    if options.get("tensorboard") and Path(options["tensorboard"]).is_file():
        faults.append(f"--tensorboard is {options['tensorboard']}, a file; it must be a folder")
    if options.get("repair_base") and options.get("base_quantize") == "none":
        faults.append("--repair-base: a float base has no rounding to be repaired; give --base-quantize int4")
    if options.get("repair_base") and options.get("init_adapter"):
        faults.append("both --repair-base and --init-adapter say what blocks begin at; choose one")
    if faults:
        raise InputError("\n".join(faults))


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return f"--{name.replace('_', '-')}"


def choose_device(device: str) -> torch.device:
    """The device to train on.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise InputError(
            f"--device is cuda, but torch {torch.__version__} (built with {built}) finds no CUDA GPU here; "
            "use --device cpu, or install a CUDA build of torch and the NVIDIA driver"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def use_bfloat16(dtype: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: as asked, or where a GPU has it."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


def check_places(output: Path, work: Path, resume: bool, overwrite: bool) -> None:
    """Refuse an output that exists and an unfinished run that would be lost.

    Args:
        output: the adapter folder to be.
        work: where its unfinished run lies.

    Raises:
        OutputError: they are in the way, or cannot be written.
        InputError: nothing to resume.
    """
    if resume and not work.exists() and output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: this run is finished already, there is nothing to resume")
    check_output(output, overwrite)
    if work.is_file():
        raise OutputError(f"{work}: is a file, where the unfinished run is to lie; move it, or choose another --output")
    if unfinished(work) and not (resume or overwrite):
        raise OutputError(
            f"{work}: holds an unfinished run (after step {read_step(work / CHECKPOINT)}); "
            "continue it with --resume, or start anew with --overwrite"
        )


def work_folder(output: Path) -> Path:
    """Where the unfinished run of an output lies: beside it."""
    return Path(f"{os.path.abspath(output)}.training")
