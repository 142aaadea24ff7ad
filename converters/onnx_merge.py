"""Add blocks to the weights of an ONNX model in place, float or quantized (MatMulNBits).

Of a float weight only the entries that a block meets are computed. Of a quantized one only the touched groups are:
dequantized, added to, rounded anew on a grid of the same kind. Every other byte stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.converters.onnx_head import feed_parameters
from diablo_export.converters.onnx_linears import Linear
from diablo_export.converters.onnx_match import Match, match
from diablo_export.errors import ExportError
from diablo_export.quantization import Quantized, dequantize, pack, quantize, unpack


@dataclass(frozen=True)
class _Corner:
    """What one block adds to one node's weight (out, in): delta (rows, columns)."""

    rows: slice
    columns: slice
    delta: Array


def onnx_merge(file: Path, adapter: Adapter) -> list[dict[str, Any]]:
    """Merge an adapter into `file` and its external data, both changed in place; returns the modules' entries.

    Raises:
        MatchError: adapted modules that the graph does not show.
        ExportError: weights that cannot be merged into, with the reason of each.
    """
    model = ir.load(file)
    found = match(model, adapter.modules)
    faults = [fault for one in found.values() for piece in one.pieces if (fault := _refusal(piece.linear))]
    if faults:
        raise ExportError(
            f"{file.name} holds weights that blocks cannot be merged into:\n"
            + "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
            + "\nGive the Hugging Face folder of the base, or keep the blocks as a branch: diablo-export export"
        )
    entries = [{**one.describe(), "action": "merged", "why": _merge(one, file.parent)} for one in found.values()]
    feed_parameters(model, adapter.saved)
    for name in adapter.saved:  # a merged model is not fed
        model.graph.inputs.remove(model.graph.initializers[name])
    ir.save(model, file)
    return entries


def _refusal(linear: Linear) -> str | None:
    """Why blocks cannot be merged into this node's weight, or None."""
    if len(linear.weight.uses()) > 1:
        others = [use.node.name for use in linear.weight.uses() if use.node is not linear.node]
        return f"{linear.name}: its weight is shared with {', '.join(map(str, others))}, which would change as well"
    if linear.group_index is not None:
        return f"{linear.name}: its groups are permuted (g_idx), so a block meets almost all of them"
    if linear.zero_points is not None and linear.zero_points.dtype != ir.DataType.UINT8:
        return f"{linear.name}: its zero points are floats; only integer ones are written"
    return None


def _merge(one: Match, folder: Path) -> str:
    """Merge one module; returns what was done."""
    touched = total = 0
    for linear, corners in _corners(one):
        if not linear.bits:
            _add(linear, corners, folder)
            continue
        touched += _requantize(linear, corners, folder)
        total += linear.out_features * -(-linear.in_features // linear.group_size)
    done = f"requantized {touched} of {total} groups, all that a block meets" if total else "added to the weight"
    return f"{done} ({one.why})"


def _corners(one: Match) -> Iterator[tuple[Linear, list[_Corner]]]:
    """Per node of the module, where its blocks fall in that node's weight."""
    offset = 0  # of the piece's first row among the module's
    for piece in one.pieces:
        size = piece.stop - piece.start
        corners = []
        for block, (inputs, outputs) in enumerate(one.module.shape.slices()):
            start, stop = max(outputs.start, offset), min(outputs.stop, offset + size)
            if start >= stop or inputs.start >= inputs.stop:
                continue
            columns = slice(start - outputs.start, stop - outputs.start)
            delta = one.module.blocks[block, : inputs.stop - inputs.start, columns].T.astype(np.float32)
            move = piece.start - offset
            corners.append(_Corner(slice(start + move, stop + move), inputs, delta))
        yield piece.linear, corners
        offset += size


def _add(linear: Linear, corners: list[_Corner], folder: Path) -> None:
    stored = _writable(linear.weight, folder)
    weight = stored.T if linear.transposed else stored  # (out, in), a view
    for corner in corners:
        total = weight[corner.rows, corner.columns].astype(np.float32) + corner.delta
        weight[corner.rows, corner.columns] = total.astype(stored.dtype)
    _keep(linear.weight, stored)


def _requantize(linear: Linear, corners: list[_Corner], folder: Path) -> int:
    """Round the touched groups anew; returns how many they are."""
    assert linear.scales is not None
    out_features, size = linear.out_features, linear.group_size
    groups = -(-linear.in_features // size)
    values = [value for value in (linear.weight, linear.scales, linear.zero_points) if value is not None]
    stored = [_writable(value, folder) for value in values]
    codes = stored[0].reshape(out_features, groups, -1)
    scales = stored[1].reshape(out_features, groups)
    zeros = stored[2].reshape(out_features, -1) if len(stored) > 2 else None
    touched = 0
    for corner in corners:
        first, last = corner.columns.start // size, -(-corner.columns.stop // size)
        begin, end = first * size, min(last * size, linear.in_features)
        part = slice(first, last)
        points = None if zeros is None else unpack(np.array(zeros[corner.rows]), linear.bits, groups)
        grid = Quantized(
            np.array(codes[corner.rows, part]),
            scales[corner.rows, part].astype(np.float32),
            None if points is None else pack(points[:, part], linear.bits),
            linear.bits, size, end - begin,
        )  # fmt: skip
        weight = dequantize(grid)
        weight[:, corner.columns.start - begin : corner.columns.stop - begin] += corner.delta
        grid = quantize(weight, linear.bits, size, symmetric=zeros is None)
        codes[corner.rows, part] = grid.codes
        scales[corner.rows, part] = grid.scales.astype(scales.dtype)
        if zeros is not None and points is not None and grid.zero_points is not None:
            points[:, part] = unpack(grid.zero_points, linear.bits, last - first)
            # the bytes' spare bits at a row's end stay as they were
            whole = groups * linear.bits // 8
            packed = pack(points, linear.bits)
            packed[:, whole:] |= zeros[corner.rows, whole:] & np.uint8(0xFF << (groups * linear.bits % 8) & 0xFF)
            zeros[corner.rows] = packed
        touched += grid.scales.size
    for value, array in zip(values, stored, strict=True):
        _keep(value, array)
    return touched


def _writable(value: ir.Value, folder: Path) -> Array:
    """The initializer's values; writing to them changes the data file, where that is where they are."""
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return np.array(tensor.numpy())
    size = tensor.length if tensor.length is not None else tensor.nbytes
    raw = np.memmap(folder / tensor.location, np.uint8, "r+", tensor.offset or 0, (size,))
    return raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())


def _keep(value: ir.Value, array: Array) -> None:
    """Finish what `_writable` began."""
    if isinstance(value.const_value, ir.ExternalTensor):
        base: Any = array
        while not isinstance(base, np.memmap):
            base = base.base
        base.flush()
    else:
        value.const_value = ir.tensor(array, name=value.name)
