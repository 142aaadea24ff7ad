"""Quantized Hugging Face checkpoints, made of a tiny float one by hand: each format from its description.

Slow and obvious on purpose, and independent of the converters: what is packed here with shifts and loops, they read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from diablo_export.blockdiag import Array

Tensors = dict[str, Array]
NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip


def words(codes: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Codes along the last axis into int32, the first in the lowest bits; or in this order within a word."""
    per = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[-1] % per)))
    found = np.zeros((len(codes), codes.shape[1] // per), np.uint32)
    for place in range(per):
        source = place if order is None else order[place]
        found |= codes[:, source::per].astype(np.uint32) << np.uint32(place * bits)
    return found.view(np.int32)


def grouped(weight: Array, group_of: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes (out, in), scales and zero points (out, groups) of a plain rounding; scales as float16 holds them."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    groups = int(group_of.max()) + 1
    scales, zeros = np.empty((len(weight), groups), np.float32), np.empty((len(weight), groups), np.uint8)
    codes = np.empty(weight.shape, np.uint8)
    for group in range(groups):
        part = weight[:, group_of == group]
        low, high = np.minimum(part.min(1), -1e-3), np.maximum(part.max(1), 1e-3)
        span = 2 * np.maximum(-low, high) if symmetric else high - low
        scales[:, group] = (span / top).astype(np.float16)
        wanted = np.full(len(weight), half) if symmetric else np.rint(-low / scales[:, group])
        zeros[:, group] = np.clip(wanted, 1, top)  # the first GPTQ format has no zero point of 0
        exact = part / scales[:, group, None] + zeros[:, group, None]
        codes[:, group_of == group] = np.clip(np.rint(exact), 0, top)
    return codes, scales, zeros


def gptq(
    weight: Array, size: int = 32, bits: int = 4, act: bool = False, symmetric: bool = True, v2: bool = False
) -> Tensors:
    inputs = weight.shape[1]
    group_of = np.arange(inputs) // size
    if act:
        group_of = np.random.default_rng(inputs).permutation(group_of)
    codes, scales, zeros = grouped(weight, group_of, bits, symmetric)
    return {
        "qweight": words(codes, bits).T.copy(),
        "qzeros": words(zeros.T - (0 if v2 else 1), bits),
        "scales": scales.T.astype(np.float16).copy(),
        "g_idx": group_of.astype(np.int32),
    }


def awq(weight: Array, size: int = 32) -> Tensors:
    codes, scales, zeros = grouped(weight, np.arange(weight.shape[1]) // size, 4, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order),
        "scales": scales.T.astype(np.float16).copy(),
    }  # fmt: skip


def compressed(weight: Array, size: int = 32, bits: int = 4, symmetric: bool = True) -> Tensors:
    codes, scales, zeros = grouped(weight, np.arange(weight.shape[1]) // size, bits, symmetric)
    made = {
        "weight_packed": words(codes, bits), "weight_scale": scales.astype(np.float16),
        "weight_shape": np.array(weight.shape, np.int64),
    }  # fmt: skip
    return made if symmetric else made | {"weight_zero_point": words(zeros.T, bits).T.copy()}


def bnb(weight: Array, size: int = 64, nested: bool = False) -> Tensors:
    flat = weight.reshape(-1, size)  # these weights are whole groups
    absmax = np.abs(flat).max(1).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "float32", "shape": list(weight.shape)}
    made: Tensors = {"weight.quant_map": NF4, "weight.absmax": absmax}
    if nested:
        table = np.linspace(-1, 1, 256, dtype=np.float32) ** 3  # any sorted table: it is stored beside the codes
        offset = float(absmax.mean())
        tops = np.array([np.abs(absmax[i : i + 256] - offset).max() for i in range(0, len(absmax), 256)], np.float32)
        steps = np.repeat(tops, 256)[: len(absmax)]
        stored = np.abs((absmax - offset)[:, None] / steps[:, None] - table).argmin(1).astype(np.uint8)
        absmax = table[stored] * steps + np.float32(offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        made |= {"weight.absmax": stored, "weight.nested_absmax": tops, "weight.nested_quant_map": table}
    codes = np.abs(flat[..., None] / absmax[:, None, None] - NF4).argmin(-1).astype(np.uint8).reshape(-1)
    made["weight"] = (codes[0::2] << 4 | codes[1::2])[:, None]
    made["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return made


def dense(tensors: Tensors, method: str, bits: int = 4, v2: bool = False, size: int = 32) -> Array:
    """The weight (out, in) that a module's tensors stand for, value by value."""
    if method == "bitsandbytes":
        return _looked_up(tensors)
    if method == "gptq":
        codes = _codes(tensors["qweight"].T, bits)
        zeros = _codes(tensors["qzeros"], bits).T + (0 if v2 else 1)
        scales, group_of = tensors["scales"].T, tensors["g_idx"]
    elif method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        codes, zeros = (_codes(tensors[name], 4, order).T for name in ("qweight", "qzeros"))
        scales, group_of = tensors["scales"].T, np.arange(codes.shape[1]) // size
    else:
        outputs, inputs = tensors["weight_shape"]
        codes = _codes(tensors["weight_packed"], bits)[:, :inputs]
        scales, group_of = tensors["weight_scale"], np.arange(inputs) // size
        zeros = np.full(scales.shape, 2 ** (bits - 1))
        if "weight_zero_point" in tensors:
            zeros = _codes(tensors["weight_zero_point"].T, bits).T[:outputs]
    scales = scales.astype(np.float32)[:, group_of]
    values: Array = (codes - zeros.astype(np.int64)[:, group_of]) * scales
    return values.astype(np.float32)


def _codes(packed: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    per = 32 // bits
    unsigned = np.ascontiguousarray(packed).view(np.uint32)
    found = np.empty((len(packed), packed.shape[1] * per), np.int64)
    for place in range(per):
        target = place if order is None else order[place]
        found[:, target::per] = unsigned >> np.uint32(place * bits) & np.uint32(2**bits - 1)
    return found


def _looked_up(tensors: Tensors) -> Array:
    state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"]))
    raw = tensors["weight"].reshape(-1)
    codes = np.stack([raw >> 4, raw & 15], 1).reshape(-1)
    absmax = tensors["weight.absmax"]
    if "nested_offset" in state:
        steps = np.repeat(tensors["weight.nested_absmax"], state["nested_blocksize"])[: len(absmax)]
        absmax = tensors["weight.nested_quant_map"][absmax] * steps + np.float32(state["nested_offset"])
    values = tensors["weight.quant_map"][codes] * np.repeat(absmax, state["blocksize"])
    return np.asarray(values.reshape(state["shape"]), np.float32)


def make(model: Path, folder: Path, config: dict[str, Any], quantize: Callable[[Array], Tensors]) -> Path:
    """A copy of a tiny Llama whose projections are quantized, its quantization_config in config.json."""
    shutil.copytree(model, folder)
    tensors: Tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "_proj." in name:
            tensors |= {name.removesuffix("weight") + key: part for key, part in quantize(value).items()}
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "quantization_config": config}))
    return folder


def parts(tensors: Tensors, module: str) -> Tensors:
    """A module's tensors, by what follows its name."""
    return {name.removeprefix(module + "."): value for name, value in tensors.items() if name.startswith(module + ".")}


def _weights(bits: int, symmetric: bool, size: int) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": size}


def _compressed_config(bits: int, symmetric: bool, size: int) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": _weights(bits, symmetric, size), "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


def _gptq_config(
    bits: int = 4, act: bool = False, symmetric: bool = True, v2: bool = False, size: int = 32
) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act, "sym": symmetric, "lm_head": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_BNB = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip

# name → (quantization_config, how a weight is quantized, how `dense` reads it, inputs of a group)
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Array], Tensors], dict[str, Any], int]] = {
    "gptq": (_gptq_config(), gptq, {}, 32),
    "gptq-act-order": (_gptq_config(act=True), lambda w: gptq(w, act=True), {}, 0),
    "gptq-asym-v2": (
        _gptq_config(symmetric=False, v2=True), lambda w: gptq(w, symmetric=False, v2=True),
        {"v2": True}, 32,
    ),
    "gptq-asym": (_gptq_config(symmetric=False), lambda w: gptq(w, symmetric=False), {}, 32),
    "gptq-8-bits": (_gptq_config(bits=8), lambda w: gptq(w, bits=8), {"bits": 8}, 32),
    "awq": (_AWQ, awq, {}, 32),
    "compressed-tensors": (_compressed_config(4, True, 32), compressed, {}, 32),
    "compressed-tensors-asym": (
        _compressed_config(4, False, 32), lambda w: compressed(w, symmetric=False), {}, 32
    ),
    "compressed-tensors-8-bits": (_compressed_config(8, True, 32), lambda w: compressed(w, bits=8), {"bits": 8}, 32),
    "nf4": (_BNB, bnb, {}, 64),
    "nf4-double": (_BNB | {"bnb_4bit_use_double_quant": True}, lambda w: bnb(w, nested=True), {}, 64),
}  # fmt: skip


def stored(folder: Path, name: str, module: str) -> Array:
    """The weight (out, in) that a checkpoint of this format holds for a module."""
    config, _, how, size = FORMATS[name]
    tensors = parts(load_file(folder / "model.safetensors"), module)
    return dense(tensors, config["quant_method"], **{**how, "size": size})
