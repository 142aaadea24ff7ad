"""How many bytes an output will take, and how much memory the work, asked before any of it starts."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict

from diablo_export.base_grid import BITS
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import InputError
from diablo_export.quantization import check_layout

_FLOAT_BYTES = {"fp32": 4, "fp16": 2}
COPIES = 2.5  # of the weights in float32 while merging: network, touched layers' grids, what is being loaded

_HIDDEN = 2**28  # numbers of hidden states that go from layer to layer, and what a step computes on the way


def check_options(quantize: str, group_size: int | None, asymmetric: bool | None, precision: str) -> None:
    """Refuse values that the options do not have, and those of a grid where nothing is to be quantized.

    Raises:
        InputError: it names the value and what is allowed.
    """
    for name, value, allowed in (("quantize", quantize, BITS), ("precision", precision, _FLOAT_BYTES)):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
    if quantize == "none":
        given = {"--group-size": group_size, "--asymmetric or --symmetric": asymmetric}
        if unused := [name for name, value in given.items() if value is not None]:
            raise InputError(
                f"{', '.join(unused)}: for the weights that --quantize rounds, and that is none; give --quantize int4 "
                "with a float Hugging Face model, or leave it out"
            )
    elif group_size is not None:
        check_layout(BITS[quantize], group_size)


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
        total += int(numbers * (BITS[quantize] / 8 + wide / group_size)) if narrow else numbers * wide
    return total


def memory_fault(checkpoint: Checkpoint, layerwise: bool = False, copies: float | None = None) -> str | None:
    """Why the model, or one of its layers at a time, cannot be held in so many float32 copies here, or None.

    As many as a merge needs, where `copies` does not say.
    """
    numbers = sum(math.prod(info.shape) for info in checkpoint) * (copies or COPIES)
    if layerwise:
        numbers = _outside_and_largest(checkpoint) + _HIDDEN
    needs = 4 * numbers
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo", encoding="ascii") as file:  # what caches hold can be had as well
            free = max(free, *(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")))
    except (OSError, ValueError, AttributeError):
        return None  # not to be known here: try
    if needs <= free:
        return None
    what = "a layer of the model" if layerwise else "the model"
    return f"{what} in torch takes about {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def _outside_and_largest(checkpoint: Checkpoint) -> float:
    """Numbers outside of all layers, and in the largest layer as often as it is held while it is trained."""
    outside, layers = 0.0, defaultdict[str, int](int)
    for info in checkpoint:
        layer = re.match(r".*?\.\d+\.", info.name)
        if layer is None:
            outside += math.prod(info.shape)
        else:
            layers[layer.group()] += math.prod(info.shape)
    return outside + 2 * COPIES * max(layers.values(), default=0)
