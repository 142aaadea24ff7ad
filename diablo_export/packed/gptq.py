"""GPTQ's weights in a Hugging Face checkpoint: 2, 4 or 8 bits, in any order of activations.

    qweight  int32 (in · bits / 32, out)      codes along the inputs, low bits first
    qzeros   int32 (groups, out · bits / 32)  zero points along the outputs
    scales   float (groups, out)
    g_idx    int32 (in,)                      the group of each input; absent: runs of group_size

The checkpoint_format "gptq" stores zero points less 1, "gptq_v2" as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import TensorInfo
from diablo_export.errors import CheckpointError
from diablo_export.packed.grid import PackedGrid, check_words
from diablo_export.quantization import BITS, pack, unpack

MARK = "qweight"  # the tensor by which a module of this format is known
CHANGED = ("qweight", "qzeros", "scales")  # what a merge writes
KEPT = ("g_idx",)  # what it reads besides
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format → what is taken off a stored zero point


def fault(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of this quantization_config cannot be read, or None."""
    if config.get("bits") not in BITS:
        return f"quantized with GPTQ in {config.get('bits')!r} bits, where 2, 4 and 8 can be read"
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stored not in _FORMATS:
        known = " and ".join(_FORMATS)
        return f"quantized with GPTQ in the checkpoint_format {stored!r}, where {known} can be read"
    return None


def sizes(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[int, int]:
    """(out_features, in_features)."""
    words, outputs = infos["qweight"].shape
    inputs = infos["g_idx"].shape[0] if "g_idx" in infos else words * 32 // int(config["bits"])
    return outputs, inputs


def unpacked(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> PackedGrid:
    """The grid of one module.

    Raises:
        CheckpointError: zero points that programs read in two ways, an order of inputs that is lost, or other integers.
    """
    check_words(tensors)
    if config.get("desc_act") and "g_idx" not in tensors:
        raise CheckpointError(
            'has no g_idx, and the config says "desc_act": true: its inputs are in an order of their own'
        )
    words, outputs = tensors["qweight"].shape
    inputs = len(tensors["g_idx"]) if "g_idx" in tensors else words * 32 // int(config["bits"])
    bits, less = words * 32 // inputs, _less(config)
    zeros = unpack(tensors["qzeros"].view(np.uint8), bits, outputs)  # (groups, out)
    if less and (zeros == 2**bits - 1).any():
        raise CheckpointError(
            'zero points of 0 in the checkpoint_format "gptq", which some programs read as 16; '
            'save the model in the format "gptq_v2"'
        )
    codes = unpack(np.ascontiguousarray(tensors["qweight"].T).view(np.uint8), bits, inputs)
    size = int(config.get("group_size") or -1)
    runs = np.arange(inputs) // (size if size > 0 else inputs)
    group_of = tensors["g_idx"].astype(np.int64) if "g_idx" in tensors else runs
    scales = tensors["scales"]
    return PackedGrid(codes, scales.T.astype(np.float32), zeros.T + np.uint8(less), group_of, bits, scales.dtype, less)


def packed(grid: PackedGrid, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of `CHANGED` for a grid; the inverse of `unpacked`."""
    words = pack(grid.codes, grid.bits).view(np.int32)  # (out, words)
    zeros = pack(np.ascontiguousarray(grid.zeros.T) - np.uint8(_less(config)), grid.bits)
    return {
        "qweight": np.ascontiguousarray(words.T),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(grid.scales.T.astype(tensors["scales"].dtype)),
    }


def _less(config: Mapping[str, Any]) -> int:
    return _FORMATS[config.get("checkpoint_format") or config.get("format") or "gptq"]
