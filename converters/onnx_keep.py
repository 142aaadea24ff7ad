"""Branches that belong to their model: some modules of a merge keep their blocks beside the weights.

The branch is that of an export, but nobody feeds it: its blocks are constants at the end of the data file. Any ONNX
Runtime runs the model as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from diablo_export import opschema
from diablo_export.converters.onnx_branch import add_branches
from diablo_export.converters.onnx_match import Match
from diablo_export.converters.onnx_weights import DATA
from diablo_export.errors import AdapterError

PAGE = 4096  # bytes: a runtime can map what begins at a multiple


def keep_branches(model: ir.Model, folder: Path, matches: Mapping[str, Match]) -> dict[str, str]:
    """Give modules of a graph their branches, with the blocks in folder/model.onnx.data.

    Args:
        model: changed in place; to be saved as folder/model.onnx.
        folder: where its data is.
        matches: the modules.

    Returns:
        The initializer that holds each module's blocks.

    Raises:
        AdapterError: values that the graph's float type cannot hold.
        ExportError: the graph has branches already.
    """
    if not matches:
        return {}
    fed = add_branches(model, matches)
    kept = {}
    with (folder / DATA).open("ab") as data:
        for name, one in matches.items():
            value = model.graph.initializers[opschema.input_name(name)]
            dtype = fed[value.name or ""]
            with np.errstate(over="ignore"):  # an error of its own
                blocks = np.ascontiguousarray(one.module.blocks.astype(dtype.numpy()))
            if not np.isfinite(blocks).all():
                raise AdapterError(f"{name}: its blocks are too large for {dtype.name.lower()}; take --precision fp32")
            data.write(bytes(-data.tell() % PAGE))
            start, shape = data.tell(), ir.Shape(blocks.shape)
            data.write(blocks.tobytes())
            value.const_value = ir.ExternalTensor(
                DATA, start, blocks.nbytes, dtype, shape=shape, name=str(value.name), base_dir=folder
            )
            value.shape = shape
            model.graph.inputs.remove(value)  # a constant: nobody feeds it
            kept[name] = str(value.name)
    return kept
