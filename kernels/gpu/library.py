"""The C interface of the kernels, called from Python on torch tensors, on the CPU and on CUDA devices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
FILE, EMULATED = "libdiablo_kernels_c.so", "libdiablo_kernels_emulated.so"


class _Shape(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("block_size_in", ctypes.c_int64),
        ("block_size_out", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("block_type", ctypes.c_int),
    ]


class _Int4(ctypes.Structure):
    _fields_ = [
        ("group_size", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("shape", _Shape), ("weights", _Int4), ("blocks", ctypes.c_void_p), ("y", ctypes.c_void_p)]


@dataclass
class Int4:
    """A layer as MatMulNBits stores it, and its blocks: codes (out_features, groups, group_size / 2) in uint8."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    blocks: Tensor


class Kernels:
    """The library in a folder, or the file itself."""

    def __init__(self, place: Path) -> None:
        self.path = place / FILE if place.is_dir() else place
        self._calls = ctypes.CDLL(str(self.path))
        self._calls.diablo_error_text.restype = ctypes.c_char_p
        self._calls.DiabloDescribe.restype = ctypes.c_char_p
        emulated = self.path.with_name(EMULATED)
        self._emulated = ctypes.CDLL(str(emulated)) if emulated.is_file() else None
        self.has_cuda = hasattr(self._calls, "diablo_block_diag_cuda")

    def describe(self) -> str:
        """What was built, as JSON."""
        return str(self._calls.DiabloDescribe().decode())

    def takes_int4(self, device: str) -> bool:
        """On the CPU the int4 kernels run on an emulated device, slowly, where that was built."""
        return device == "cuda" or self._emulated is not None

    def branch(self, x: Tensor, blocks: Tensor, y0: Tensor, y: Tensor, scales: Tensor | None = None) -> None:
        """y = y0 + x · blockdiag(blocks · scales), rows of x and of y at any stride, on the current stream."""
        shape = _shape(x, blocks, y)
        pointers = [_pointer(value) for value in (x, blocks, scales, y0, y)]
        if x.is_cuda:
            self._on_cuda(self._calls.diablo_block_diag_cuda, ctypes.byref(shape), *pointers)
        else:
            self._check(self._calls.diablo_block_diag_cpu(ctypes.byref(shape), *pointers, None, 0), None)

    def int4(self, x: Tensor, layers: Sequence[Int4], outputs: Sequence[Tensor]) -> None:
        """Each y = x · W + x · blockdiag(blocks), at most three in one launch."""
        given = (_Layer * len(layers))(*(_layer(x, layer, y) for layer, y in zip(layers, outputs, strict=True)))
        self._int4("diablo_int4", x.is_cuda, given, len(layers), _pointer(x))

    def dense(self, layer: Int4, dense: Tensor) -> None:
        """W + blockdiag(blocks)ᵀ into (out_features, in_features)."""
        rows = dense[:1]  # as if these were x, of which the sizes alone are read
        given = _layer(rows, layer, rows.new_empty(1, len(dense)))
        self._int4("diablo_int4_dense", dense.is_cuda, ctypes.byref(given), _pointer(dense))

    def _int4(self, name: str, cuda: bool, *arguments: Any) -> None:
        if cuda:
            self._on_cuda(getattr(self._calls, f"{name}_cuda"), *arguments)
        else:
            self._check(getattr(self._emulated, f"{name}_emulated")(*arguments, None, None), None)

    def _on_cuda(self, call: Any, *arguments: Any) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        cause = ctypes.c_char_p()
        self._check(call(*arguments, stream, ctypes.byref(cause)), cause.value)

    def _check(self, code: int, cause: bytes | None) -> None:
        if code:
            raise RuntimeError(f"{self._calls.diablo_error_text(code).decode()}: {(cause or b'').decode()}")


def _pointer(value: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def _layer(x: Tensor, layer: Int4, y: Tensor) -> _Layer:
    tensors = [_pointer(value) for value in (layer.codes, layer.scales, layer.zeros, layer.blocks, y)]
    codes, scales, zeros, blocks, output = tensors
    return _Layer(_shape(x, layer.blocks, y), _Int4(layer.group_size, codes, scales, zeros), blocks, output)


def _shape(x: Tensor, blocks: Tensor, y: Tensor) -> _Shape:
    """x (rows, in_features), y (rows, out_features), blocks (num_blocks, block_size_in, block_size_out) or empty."""
    rows, in_features = x.shape
    types = TYPES[x.dtype], TYPES[blocks.dtype]
    return _Shape(rows, in_features, y.shape[1], *blocks.shape, x.stride(0), y.stride(0), *types)
