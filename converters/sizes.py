"""How many bytes an output will take, asked before any work starts."""

from __future__ import annotations

import math

from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import InputError
from diablo_export.quantization import check_layout

_FLOAT_BYTES = {"fp32": 4, "fp16": 2}
_CODE_BITS = {"none": 0, "int8": 8, "int4": 4}


def check_options(quantize: str, group_size: int, precision: str) -> None:
    """Refuse values that the options do not have.

    Raises:
        InputError: it names the value and what is allowed.
    """
    for name, value, allowed in (("quantize", quantize, _CODE_BITS), ("precision", precision, _FLOAT_BYTES)):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
    if quantize != "none":
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
