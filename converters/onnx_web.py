"""Turn a branch export into one for JavaScript, whose runtimes feed only plain inputs and know no `.onnx_adapter`.

onnxruntime-web and onnxruntime-node refuse to be fed an initializer that is also an input. So the blocks become inputs
that every run must be given, and each adapter is a safetensors file with one tensor for each of them. No adapter is a
file of the same kind: empty blocks, and the head that stood in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save

from diablo_export.block_storage import BASE_KEY
from diablo_export.blockdiag import Array
from diablo_export.converters.genai_config import CONFIG
from diablo_export.errors import InputError

ENDING = ".safetensors"
NO_ADAPTER = "base"  # the file beside the adapters, so none may have its name


def check_names(names: Mapping[str, object]) -> None:
    """Refuse an adapter whose file would be the one of no adapter.

    Raises:
        InputError: it says how to name the adapter.
    """
    if NO_ADAPTER in names:
        raise InputError(
            f"adapter name {NO_ADAPTER!r}: --for web writes adapters/{NO_ADAPTER}{ENDING} for no adapter; "
            "name it otherwise with --adapter NAME=FOLDER"
        )


def require_inputs(model: ir.Model) -> dict[str, Array]:
    """Make every overridable initializer a plain input; returns the values that they had, which are no adapter."""
    values = {}
    for value in model.graph.inputs:
        held = model.graph.initializers.pop(value.name or "", None)
        if held is not None and held.const_value is not None:
            values[str(held.name)] = np.array(held.const_value.numpy())  # a copy: its file is written anew
            held.const_value = None
    return values


def write_safetensors(file: Path, parameters: Mapping[str, Array], base: str) -> None:
    """Write what to feed, a tensor for each graph input under the input's name, and the SHA-256 of the base."""
    file.parent.mkdir(exist_ok=True)
    # not save_file, whose files only their owner may read: these are for a web server
    values = {name: np.ascontiguousarray(value) for name, value in parameters.items()}
    file.write_bytes(save(values, {BASE_KEY: base}))


def leave_out_genai(folder: Path) -> None:
    """Take onnxruntime-genai's configuration out of the folder: it feeds no required blocks."""
    (folder / CONFIG).unlink(missing_ok=True)
