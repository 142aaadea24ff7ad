"""Adapters as `.onnx_adapter` files: what onnxruntime and onnxruntime-genai load and swap while a session is open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.adapter import Adapter
from diablo_export.block_storage import (
    BLOCKS_SUFFIX,
    MOST_ERROR,
    SCALES_SUFFIX,
    base_mark,
    from_int8,
    relative_error,
    to_int8,
)
from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.errors import AdapterError, ExportError
from diablo_export.opschema import input_name, scales_name
from diablo_export.swap import write_adapter

FOLDER = "adapters"
ENDING = ".onnx_adapter"
_LIMIT = 2**31  # it is a flatbuffer, whose offsets have 31 bits


def check_classes(name: str, adapter: Adapter, classes: Sequence[str]) -> None:
    """Hold an adapter's classes against those that config.json of a folder names, in class order.

    Raises:
        AdapterError: they are the same in another order: an answer would be named as another one.
    """
    if not adapter.labels or not classes or adapter.labels == list(classes):
        return
    said = (
        f"adapter {name} ({adapter.path}): has the classes {', '.join(adapter.labels)}, config.json of the folder has "
        f"{', '.join(classes)}"
    )
    if sorted(adapter.labels) == sorted(classes):
        raise AdapterError(f"{said}; export it into a folder of its own")
    log.warning("%s: its answers are to be read by their numbers, or by its own adapter_config.json", said)


def tensors(adapter: Adapter, inputs: Mapping[str, np.dtype[Any]]) -> dict[str, Array]:
    """What to feed a branch export's `inputs` (name → type) for this adapter.

    Modules that the adapter leaves alone get empty blocks: another adapter's must not stay in place.

    Raises:
        AdapterError: values that the type cannot hold.
    """
    given = {input_name(name): module.blocks for name, module in adapter.modules.items()} | adapter.saved
    empty = np.zeros((0, 0, 0), np.float32)
    made: dict[str, Array] = {}
    with np.errstate(over="ignore"):  # an error of its own, below
        for name, dtype in inputs.items():
            if name.endswith(SCALES_SUFFIX):
                continue  # made with their blocks
            if dtype == np.int8:
                codes, scales = to_int8(given.get(name, empty))
                made |= {name: codes, name.removesuffix(BLOCKS_SUFFIX) + SCALES_SUFFIX: scales}
            else:
                made[name] = np.ascontiguousarray(given.get(name, empty).astype(dtype))
    large = [f"{name} (up to {np.abs(given[name]).max():.3g})" for name, v in made.items() if not np.isfinite(v).all()]
    if large:
        raise AdapterError(
            f"{adapter.path}: values too large for {next(iter(inputs.values()))}: {', '.join(large)}; "
            "export with --precision fp32"
        )
    return made


def storage_errors(name: str, adapter: Adapter, made: Mapping[str, Array]) -> dict[str, float]:
    """How far the stored blocks are from the trained ones, by module: ‖stored − trained‖ / ‖trained‖.

    Empty where they are stored in float32. Says the largest, and warns of those over MOST_ERROR.
    """
    errors = {}
    for module, one in adapter.modules.items():
        stored = made[input_name(module)]
        if stored.dtype == np.int8:
            stored = from_int8(stored, made[scales_name(module)])
        elif stored.dtype == np.float32:
            continue
        errors[module] = relative_error(one.blocks, stored)
    if not errors:
        return {}
    worst = max(errors, key=lambda module: errors[module])
    mean = sum(errors.values()) / len(errors)
    log.info("adapter %s: stored blocks are off by %.2g of their size, %.2g in %s", name, mean, errors[worst], worst)
    over = sorted(module for module, error in errors.items() if error > MOST_ERROR)
    if over:
        log.warning(
            "adapter %s: blocks of %s are off by more than %g of their size when stored in so few bits (%.2g in %s); "
            "check with parity, or export with a wider --block-dtype",
            name, ", ".join(over), MOST_ERROR, errors[worst], worst,
        )  # fmt: skip
    return errors


def write_onnx_adapter(file: Path, parameters: Mapping[str, Array], base: str | None = None) -> None:
    """Write `parameters` as an .onnx_adapter file.

    Args:
        file: to write; its folder is made where it is missing.
        parameters: values by graph input, as `tensors` makes them.
        base: SHA-256 of the base, as the model carries it: `diablo_export.runtime` then refuses the file for models of
            another base. None: it will say that this cannot be checked.

    Raises:
        ExportError: they are more than the format holds.
    """
    size = sum(value.nbytes for value in parameters.values())
    if size >= _LIMIT:
        raise ExportError(
            f"{file.name}: {size / 1e9:.1f} GB of blocks, an .onnx_adapter file holds less than {_LIMIT / 1e9:.1f} GB; "
            "export with --block-dtype fp16 or int8, or train with more blocks"
        )
    file.parent.mkdir(exist_ok=True)
    write_adapter(file, parameters, None if base is None else base_mark(base))
