"""How many bytes an output will take, and how much memory the work, asked before any of it starts."""

from __future__ import annotations

import math
import os

from diablo_export.adapter import TASKS
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import InputError
from diablo_export.quantization import check_layout

_FLOAT_BYTES = {"fp32": 4, "fp16": 2}
_COPIES = 2.5  # of the weights in float32 while merging: network, touched layers' grids, what is being loaded
_CODE_BITS = {"none": 0, "int8": 8, "int4": 4}


def grid(task_type: str, group_size: int | None, asymmetric: bool | None) -> tuple[int, bool]:
    """Group size and zero points where they were not asked for: 32 without for a decoder, 16 with for a classifier.

    A decoder's speed is that of reading its weights, and a group of 32 without zero point is the smallest that keeps a
    fine-tune. A classifier's margins are what int4 wears down: on SST-2 its int4 base leaves 0.96 of the fine-tune's
    effect with the decoder's grid and 0.985 with this one, for a thirtieth of the file: most of that is embeddings.
    """
    classifier = task_type == TASKS["text-classification"]
    return group_size or (16 if classifier else 32), classifier if asymmetric is None else asymmetric


def check_options(quantize: str, group_size: int | None, precision: str) -> None:
    """Refuse values that the options do not have.

    Raises:
        InputError: it names the value and what is allowed.
    """
    for name, value, allowed in (("quantize", quantize, _CODE_BITS), ("precision", precision, _FLOAT_BYTES)):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
    if quantize != "none" and group_size is not None:
        check_layout(_CODE_BITS[quantize], group_size)


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """The stored size of all tensors."""
    return sum(info.nbytes for info in checkpoint)


def onnx_bytes(checkpoint: Checkpoint, quantize: str, group_size: int, precision: str) -> int:
    """About what the checkpoint takes as ONNX: matrices quantized where asked, embeddings and vectors float."""
    wide = _FLOAT_BYTES[precision]
    total = 0
    for info in checkpoint:
        numbers = math.prod(info.shape)
        narrow = quantize != "none" and len(info.shape) == 2 and "embed" not in info.name
        total += int(numbers * (_CODE_BITS[quantize] / 8 + wide / group_size)) if narrow else numbers * wide
    return total


def memory_fault(checkpoint: Checkpoint) -> str | None:
    """Why the model cannot be loaded beside its int4 copy here, or None."""
    needs = sum(4 * math.prod(info.shape) for info in checkpoint) * _COPIES
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo", encoding="ascii") as file:  # what caches hold can be had as well
            free = max(free, *(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")))
    except (OSError, ValueError, AttributeError):
        return None  # not to be known here: try
    if needs <= free:
        return None
    return f"the model in torch takes about {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
