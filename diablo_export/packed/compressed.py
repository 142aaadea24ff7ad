"""compressed-tensors' pack-quantized weights in a Hugging Face checkpoint: 2, 4 or 8 bits.

    weight_packed      int32 (out, in · bits / 32)      codes along the inputs, low bits first
    weight_scale       float (out, groups)
    weight_zero_point  int32 (out · bits / 32, groups)  along the outputs; or int8 (out, groups); may be absent
    weight_shape       int (2,)                         (out, in)
    weight_g_idx       int32 (in,)                      the group of each input; absent: runs of inputs

Codes are signed; packed, they are moved by half their range, and so are zero points that are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import TensorInfo
from diablo_export.errors import CheckpointError
from diablo_export.packed.grid import Index, PackedGrid
from diablo_export.quantization import BITS, Codes, pack, unpack

MARK = "weight_packed"
CHANGED = ("weight_packed", "weight_scale", "weight_zero_point")
KEPT = ("weight_shape", "weight_g_idx")
_ROUNDED = ("input_activations", "output_activations")


def fault(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of this quantization_config cannot be read, or None."""
    groups = config.get("config_groups") or {}
    formats = {group.get("format") or config.get("format") for group in groups.values()}
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups.values()}
    if formats != {"pack-quantized"} or not bits <= set(BITS):
        found = ", ".join(sorted(map(str, formats))), ", ".join(sorted(map(str, bits)))
        return (
            "quantized with compressed-tensors in the format {} of {} bits, where pack-quantized of 2, 4 or 8 bits "
            "can be read".format(*found)
        )
    if online := _computed(config.get("transform_config") or {}):
        return (
            f"quantized with compressed-tensors with transforms that are computed at run time ({online}), which are not"
        )
    return None


def activations(config: Mapping[str, Any]) -> str | None:
    """Which activations a runtime of the checkpoint rounds as well, and to how many bits; None where it rounds none."""
    groups = (config.get("config_groups") or {}).values()
    said = {f"{key} of {group[key].get('num_bits')} bits" for group in groups for key in _ROUNDED if group.get(key)}
    if cache := config.get("kv_cache_scheme"):
        said.add(f"kv_cache_scheme of {cache.get('num_bits')} bits")
    return ", ".join(sorted(said)) or None


def _computed(transforms: Mapping[str, Any]) -> str:
    """Where activations are rotated before or after a weight, which are no part of it then; weights hold the others."""
    schemes = (transforms.get("config_groups") or {}).values()
    places = {str(one.get("location")) for scheme in schemes for one in scheme.get("apply") or []}
    return ", ".join(sorted(places - {"weight_input", "weight_output"}))


def sizes(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[int, int]:
    """(out_features, in_features)."""
    outputs, inputs = infos["weight_shape"].read().reshape(-1).tolist()
    return int(outputs), int(inputs)


def unpacked(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> PackedGrid:
    """The grid of one module.

    Raises:
        CheckpointError: groups that are no runs of inputs, such as one for the whole weight.
    """
    outputs, inputs = (int(size) for size in tensors["weight_shape"].reshape(-1))
    words, scales = tensors["weight_packed"], tensors["weight_scale"]
    bits = next(bits for bits in BITS if -(-inputs * bits // 32) == words.shape[1])
    if scales.shape[:1] != (outputs,) or scales.ndim != 2:
        raise CheckpointError("has one scale for the whole weight, which every block meets")
    codes = unpack(words.view(np.uint8), bits, inputs)
    zeros = _zeros(tensors.get("weight_zero_point"), scales.shape, bits)
    group_of = _group_of(tensors, config, inputs, scales.shape[1])
    return PackedGrid(codes, scales.astype(np.float32), zeros, group_of, bits, scales.dtype)


def packed(grid: PackedGrid, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of `CHANGED` for a grid; the inverse of `unpacked`."""
    made = {
        "weight_packed": _words(grid.codes, grid.bits),
        "weight_scale": grid.scales.astype(tensors["weight_scale"].dtype),
    }
    stored = tensors.get("weight_zero_point")
    if stored is not None and stored.dtype == np.int8:
        made["weight_zero_point"] = (grid.zeros.astype(np.int16) - 2 ** (grid.bits - 1)).astype(np.int8)
    elif stored is not None:
        made["weight_zero_point"] = np.ascontiguousarray(_words(grid.zeros.T, grid.bits).T)
    return made


def _zeros(stored: Array | None, shape: tuple[int, ...], bits: int) -> Codes:
    """Zero points (out, groups), as codes."""
    half = 2 ** (bits - 1)
    if stored is None:
        return np.full(shape, half, np.uint8)
    if stored.dtype == np.int8:
        return np.asarray(stored.astype(np.int16) + half, np.uint8)
    codes: Codes = unpack(np.ascontiguousarray(stored.T).view(np.uint8), bits, shape[0])  # (groups, out)
    return np.ascontiguousarray(codes.T)


def _words(codes: Codes, bits: int) -> Array:
    """Codes along the last axis → int32, the last one padded with zero bits."""
    short = -codes.shape[-1] % (32 // bits)
    padded = np.pad(codes, ((0, 0), (0, short)))
    return pack(padded, bits).view(np.int32)


def _group_of(tensors: Mapping[str, Array], config: Mapping[str, Any], inputs: int, groups: int) -> Index:
    """The group of each input."""
    order = tensors.get("weight_g_idx")
    if order is not None and (order >= 0).all():  # −1 throughout: not in use
        return order.astype(np.int64)
    said = [(group.get("weights") or {}).get("group_size") for group in (config.get("config_groups") or {}).values()]
    fitting = [size for size in said if size and size > 0 and -(-inputs // size) == groups]
    return np.arange(inputs) // (fitting[0] if fitting and groups > 1 else -(-inputs // groups))
