"""The exported base of a merged model: the base's own weights in the very layout that the merge wrote.

The same graph and the same kernels then run base and merged, so that their difference is the adapter and not the
export. Only adapted weights are rebuilt; memory follows their sum. On the way each merged weight is compared with
the base wherever no block reaches: a merge changes nothing there, so a difference is a fault of the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from diablo_export.adapter import AdaptedModule, Adapter, base_weight
from diablo_export.algorithms import HAVE_ZEROS, LEARNED, Algorithm
from diablo_export.blockdiag import Array, BlockShape
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import InputError
from diablo_export.quantization import Float32, Quantized, quantize

Mask = npt.NDArray[np.bool_]

_ACROSS = ("hqq", "gptq", LEARNED)  # algorithms that look at more than one group at a time


@dataclass(frozen=True)
class ExportedBase:
    """The base's initializers by name, and the modules whose weight differs from the base where no block reaches."""

    initializers: dict[str, Array]
    foreign: list[str]


def rebuild(path: Path, modules: list[dict[str, Any]], checkpoint: Checkpoint, adapter: Adapter) -> ExportedBase:
    """Make the base's initializers for a merged model.

    Args:
        path: the merged model.onnx.
        modules: the manifest's entries, which say how each weight lies.
        checkpoint: the base.
        adapter: what was merged; tells where blocks reach.

    Raises:
        InputError: the manifest names initializers that the model does not have, or of another size.
    """
    stored = Stored(path)
    values: dict[str, Array] = {}
    foreign: list[str] = []
    for entry in flat(modules):
        module = adapter.modules.get(entry["name"])
        if module is None:
            raise InputError(f"{path.parent}: holds a merged {entry['name']}, which the adapter {adapter.path} lacks")
        weight = base_weight(checkpoint, entry["name"])
        for name, value, mask in _parts(entry, weight, reached(module.shape), module):
            whole = stored.read(name)
            index = _index(entry, whole, value, path)
            found = whole[index].reshape(value.shape)
            if not np.array_equal(found[~mask], value.astype(found.dtype)[~mask]):
                foreign.append(entry["name"])
            target = values.setdefault(name, whole)
            target[index] = value.astype(whole.dtype).reshape(target[index].shape)
    for entry in modules:  # blocks beside the weights: without them the branch adds nothing
        if entry.get("action") == "kept":
            values[entry["blocks"]] = np.zeros_like(stored.read(entry["blocks"]))
    return ExportedBase(values, sorted(set(foreign)))


def flat(modules: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One entry per merged weight: a module that lies in several nodes has one for each."""
    for entry in modules:
        for part in entry.get("parts") or [entry]:
            if entry.get("action") == "merged" and "weight" in part:
                yield {**part, "name": entry["name"], "algorithm": entry.get("algorithm")}


def reached(shape: BlockShape) -> Mask:
    """Which weights (out_features, in_features) some block meets."""
    mask = np.zeros((shape.out_features, shape.in_features), np.bool_)
    for inputs, outputs in shape.slices():
        mask[outputs, inputs] = True
    return mask


def _parts(
    entry: Mapping[str, Any], weight: Float32, reached: Mask, module: AdaptedModule
) -> Iterator[tuple[str, Array, Mask]]:
    """(initializer, the base's value for it, where a merge may have changed it), for each initializer of a weight."""
    if is_slice(entry, module):
        rows = slice(*entry["rows"])
        weight, reached = weight[rows], reached[rows]
    if not entry.get("bits"):
        transposed = entry["transposed"]
        yield entry["weight"], weight.T if transposed else weight, reached.T if transposed else reached
        return
    base = _quantized(entry, weight)
    groups, size = base.scales.shape[1], entry["group_size"]
    if entry.get("algorithm") in _ACROSS:  # what a block changes in one group, others answer
        reached = np.ones_like(reached)
    padded = np.pad(reached, ((0, 0), (0, groups * size - reached.shape[1])))
    touched = np.asarray(padded.reshape(len(padded), groups, size).any(-1))  # (out, groups)
    yield entry["weight"], base.codes, np.broadcast_to(touched[..., None], base.codes.shape)
    yield entry["scales"], base.scales, touched
    if base.zero_points is not None and base.zero_points.dtype != np.uint8:
        yield entry["zero_points"], base.zero_points, touched
    elif base.zero_points is not None:
        # a byte holds the zero points of two 4-bit groups: touched if either is
        per_byte = 8 // entry["bits"]
        short = -groups % per_byte
        bytes_touched: Any = np.pad(touched, ((0, 0), (0, short))).reshape(len(touched), -1, per_byte).any(-1)
        yield entry["zero_points"], base.zero_points, bytes_touched


def _quantized(entry: Mapping[str, Any], weight: Float32) -> Quantized:
    """The base's weight as the merge's was quantized.

    GPTQ's moments are not at hand any more: in its place the base is rounded to the nearest, with the same groups.
    """
    grid = (entry["bits"], entry["group_size"], entry["symmetric"])
    if entry.get("algorithm") in HAVE_ZEROS:
        return Algorithm(entry["algorithm"]).quantize(entry["name"], *grid, weight)
    return quantize(weight, *grid)


def is_slice(entry: Mapping[str, Any], module: AdaptedModule) -> bool:
    """Whether `rows` are rows of the module that this weight holds, not rows of the weight that hold the module."""
    rows = entry.get("rows")
    return rows is not None and rows[1] - rows[0] < module.out_features


def _index(entry: Mapping[str, Any], whole: Array, value: Array, path: Path) -> tuple[slice, ...]:
    """Where in the stored initializer the value lies: everywhere, or in its rows of a fused weight."""
    if whole.size == value.size:
        return (slice(None),)
    axis = 1 if entry["transposed"] and not entry.get("bits") else 0
    rows = entry.get("rows")
    if not rows or whole.ndim != value.ndim or rows[1] - rows[0] != value.shape[axis]:
        raise InputError(
            f"{path}: initializer of {entry['name']} has shape {whole.shape}, the base gives {value.shape}; "
            "the manifest does not belong to this model, or --model is another one"
        )
    return (slice(None),) * axis + (slice(*rows),)


class Stored:
    """Initializers of a model, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = onnx.load(path, load_external_data=False)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(self, name: str) -> Array:
        """A writable copy of an initializer."""
        if name not in self.tensors:
            raise InputError(f"{self.path}: has no initializer {name}, which the manifest names; make the folder again")
        return read_tensor(self.tensors[name], self.path)


def read_tensor(tensor: onnx.TensorProto, path: Path) -> Array:
    """A writable copy of an initializer of the model at `path`.

    Raises:
        InputError: its data are not there, too short, or a link, which onnx does not follow.
    """
    try:
        return np.array(onnx.numpy_helper.to_array(tensor, str(path.parent)))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"{path}: the data of {tensor.name} cannot be read: {error}; copy the folder again") from error
