"""AWQ's weights in a Hugging Face checkpoint, version "gemm": 4 bits, runs of group_size inputs.

    qweight  int32 (in, out / 8)      codes along the outputs
    qzeros   int32 (groups, out / 8)  zero points likewise
    scales   float (groups, out)

A word holds eight outputs, low bits first in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import TensorInfo
from diablo_export.packed.grid import PackedGrid, check_words
from diablo_export.quantization import Codes, pack, unpack

MARK = "qweight"
CHANGED = ("qweight", "qzeros", "scales")
KEPT: tuple[str, ...] = ()
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # which of eight outputs lies at each place of a word
_BITS = 4


def fault(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of this quantization_config cannot be read, or None."""
    bits = config.get("bits", config.get("w_bit"))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != _BITS or version != "gemm":
        return f'quantized with AWQ in {bits} bits, version "{version}", where 4 bits of version "gemm" can be read'
    return None


def sizes(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[int, int]:
    """(out_features, in_features)."""
    inputs, words = infos["qweight"].shape
    return words * len(_ORDER), inputs


def unpacked(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> PackedGrid:
    """The grid of one module."""
    check_words(tensors)
    codes, zeros = (_outputs(tensors[name]) for name in ("qweight", "qzeros"))
    inputs, groups = len(codes), len(zeros)
    scales = tensors["scales"]
    size = int(config.get("group_size", config.get("q_group_size", -1)))
    group_of = np.arange(inputs) // (size if size > 0 else -(-inputs // groups))
    return PackedGrid(
        np.ascontiguousarray(codes.T), scales.T.astype(np.float32), np.ascontiguousarray(zeros.T), group_of, _BITS,
        scales.dtype,
    )  # fmt: skip


def packed(grid: PackedGrid, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of `CHANGED` for a grid; the inverse of `unpacked`."""
    scales = np.ascontiguousarray(grid.scales.T.astype(tensors["scales"].dtype))
    return {"qweight": _words(grid.codes.T), "qzeros": _words(grid.zeros.T), "scales": scales}


def _outputs(words: Array) -> Codes:
    """(…, out / 8) words → (…, out) codes."""
    places = unpack(words.view(np.uint8), _BITS, words.shape[-1] * len(_ORDER))
    eights = places.reshape(*places.shape[:-1], -1, len(_ORDER))
    return eights[..., np.argsort(_ORDER)].reshape(places.shape)


def _words(codes: Codes) -> Array:
    """(…, out) codes → (…, out / 8) words."""
    eights = codes.reshape(*codes.shape[:-1], -1, len(_ORDER))[..., _ORDER]
    return pack(eights.reshape(codes.shape), _BITS).view(np.int32)
