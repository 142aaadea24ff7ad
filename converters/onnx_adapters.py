"""Adapters as `.onnx_adapter` files: what onnxruntime and onnxruntime-genai load and swap while a session is open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.errors import AdapterError, ExportError, require
from diablo_export.opschema import input_name

FOLDER = "adapters"
ENDING = ".onnx_adapter"
_LIMIT = 2**31  # it is a flatbuffer, whose offsets have 31 bits


def tensors(adapter: Adapter, inputs: Mapping[str, np.dtype[Any]]) -> dict[str, Array]:
    """What to feed a branch export's `inputs` (name → type) for this adapter.

    Modules that the adapter leaves alone get empty blocks: another adapter's must not stay in place.

    Raises:
        AdapterError: values that the type cannot hold.
    """
    given = {input_name(name): module.blocks for name, module in adapter.modules.items()} | adapter.saved
    empty = np.zeros((0, 0, 0), np.float32)
    with np.errstate(over="ignore"):  # an error of its own, below
        made = {name: np.ascontiguousarray(given.get(name, empty).astype(dtype)) for name, dtype in inputs.items()}
    large = [f"{name} (up to {np.abs(given[name]).max():.3g})" for name, v in made.items() if not np.isfinite(v).all()]
    if large:
        raise AdapterError(
            f"{adapter.path}: values too large for {next(iter(inputs.values()))}: {', '.join(large)}; "
            "export with --precision fp32"
        )
    return made


def write_onnx_adapter(file: Path, parameters: Mapping[str, Array]) -> None:
    """Write `parameters` as an .onnx_adapter file.

    Raises:
        ExportError: they are more than the format holds.
    """
    size = sum(value.nbytes for value in parameters.values())
    if size >= _LIMIT:
        raise ExportError(
            f"{file.name}: {size / 1e9:.1f} GB of blocks, an .onnx_adapter file holds less than {_LIMIT / 1e9:.1f} GB; "
            "export with --precision fp16, or train with more blocks"
        )
    onnxruntime = require("onnxruntime", "cpu")
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    file.parent.mkdir(exist_ok=True)
    adapter.export_adapter(str(file))
