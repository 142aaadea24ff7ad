"""A quantized Hugging Face checkpoint seen as a float one, for the roads to ONNX; and its codes, for a graph of them.

MatMulNBits takes the codes of GPTQ, AWQ and compressed-tensors as they are, where each scale belongs to a run of inputs
that it knows. Other weights (nf4, an activation order) go into the graph as the floats that they stand for.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint, TensorInfo
from diablo_export.converters.hf_folder import OTHER_WEIGHTS
from diablo_export.converters.onnx_weights import Source
from diablo_export.packed.grid import PackedGrid
from diablo_export.packed.modules import Stored, all_stored, refuse_transposed, refuse_unreadable
from diablo_export.quantization import BITS, GROUP_SIZES, Quantized, pack


@dataclass(frozen=True)
class UnpackedInfo(TensorInfo):
    """A quantized weight as float32; `start` and `stop` are bytes of that, not of a file."""

    packed: Stored | None = None

    def read(self) -> Array:
        """Its rows from `start` to `stop`, (rows, in_features)."""
        assert self.packed is not None
        row = 4 * self.shape[1]
        return self.packed.unpacked().values()[self.start // row : self.stop // row]


def float_view(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose quantized weights are float tensors, unpacked when they are read; a float one as it is.

    Its folder, which goes with it, has the other files and a config.json that says nothing of quantization.

    Raises:
        CheckpointError: a format that cannot be read.
    """
    if not checkpoint.config.get("quantization_config"):
        return checkpoint
    refuse_unreadable(checkpoint)
    refuse_transposed(checkpoint)
    packed = all_stored(checkpoint)
    codes = {info.name for one in packed for info in one.infos.values()}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in codes}
    for one in packed:
        name, first = f"{one.prefix}weight", next(iter(one.infos.values()))
        tensors[name] = UnpackedInfo(name, first.file, "F32", one.shape, 0, 4 * math.prod(one.shape), packed=one)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    view = replace(checkpoint, folder=_plain_folder(checkpoint, config), config=config, tensors=tensors)
    weakref.finalize(view, shutil.rmtree, view.folder, ignore_errors=True)
    return view


def stored_codes(source: Source) -> Quantized | None:
    """The codes of a weight as MatMulNBits takes them, where they are stored so; None: its floats must do."""
    info = source.stored
    if not isinstance(info, UnpackedInfo) or info.packed is None or source.blocks is not None:
        return None
    grid = info.packed.unpacked()
    if not isinstance(grid, PackedGrid) or grid.bits not in BITS:
        return None
    size, inputs = int((grid.group_of == 0).sum()), grid.shape[1]
    if size not in GROUP_SIZES or not np.array_equal(grid.group_of, np.arange(inputs) // size):
        return None
    rows = slice(*source.rows) if source.rows else slice(None)
    codes = np.pad(grid.codes[rows], ((0, 0), (0, -inputs % size)))
    groups = codes.reshape(len(codes), -1, size)
    zeros, middle = grid.zeros[rows], 2 ** (grid.bits - 1)
    points = None if (grid.zeros == middle).all() else pack(zeros, grid.bits, fill=middle)
    return Quantized(pack(groups, grid.bits), grid.scales[rows], points, grid.bits, size, inputs)


def _plain_folder(checkpoint: Checkpoint, config: dict[str, object]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="diablo-export-"))
    for file in checkpoint.folder.iterdir():
        if file.is_file() and not file.name.endswith(OTHER_WEIGHTS) and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
