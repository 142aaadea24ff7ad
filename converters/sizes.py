"""How many bytes an output will take, asked before any work starts."""

from __future__ import annotations

import math

from diablo_export.checkpoint import Checkpoint

_FLOAT_BYTES = {"fp32": 4, "fp16": 2}
_CODE_BITS = {"int8": 8, "int4": 4}


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
