"""Adapters as `.onnx_adapter` files: what onnxruntime and onnxruntime-genai load and swap while a session is open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.errors import require
from diablo_export.opschema import input_name

FOLDER = "adapters"
ENDING = ".onnx_adapter"


def tensors(adapter: Adapter, inputs: Mapping[str, np.dtype[Any]]) -> dict[str, Array]:
    """What to feed a branch export's `inputs` (name → type) for this adapter.

    Modules that the adapter leaves alone get empty blocks: another adapter's must not stay in place.
    """
    given = {input_name(name): module.blocks for name, module in adapter.modules.items()} | adapter.saved
    empty = np.zeros((0, 0, 0), np.float32)
    return {name: np.ascontiguousarray(given.get(name, empty).astype(dtype)) for name, dtype in inputs.items()}


def write_onnx_adapter(file: Path, parameters: Mapping[str, Array]) -> None:
    """Write `parameters` as an .onnx_adapter file."""
    onnxruntime = require("onnxruntime", "cpu")
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    file.parent.mkdir(exist_ok=True)
    adapter.export_adapter(str(file))
