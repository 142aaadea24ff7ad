"""Several adapters as one: the weighted sum of their blocks, exactly, while the model runs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diablo_export.block_storage import (
    BLOCKS_SUFFIX,
    MOST_ERROR,
    SCALES_SUFFIX,
    add,
    from_int8,
    relative_error,
    to_int8,
)
from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.errors import InputError, indented
from diablo_export.swap import SwapAdapter, load_adapter, write_adapter

Values = dict[str, Array]


def combine(parts: Sequence[SwapAdapter | tuple[SwapAdapter, float]]) -> SwapAdapter:
    """The adapter whose blocks are the sum of the given ones', each times its weight.

    Blocks add exactly, in float32, then rounded once to the type that the model takes; int8 blocks get new scales.
    Where block counts differ the sum has the smaller count, and the finer blocks must lie inside the coarser ones.
    A classification head is kept as it is and has no weight, so that only one of the adapters may bring one.

    Args:
        parts: adapters, or pairs of adapter and weight; a weight that is not given is 1.

    Raises:
        InputError: lists every module whose blocks cannot be added; adapters for several bases, of other types, with
            several heads, or a weight that is no number.
    """
    pairs = [(one, 1.0) if isinstance(one, SwapAdapter) else (one[0], float(one[1])) for one in parts]
    _check(pairs)
    read = [(adapter, weight, adapter.values()) for adapter, weight in pairs]
    made: Values = {}
    faults: list[str] = []
    for name in sorted(set().union(*(values for _, _, values in read))):
        holding = [(values, weight) for _, weight, values in read if name in values]
        if name.endswith(SCALES_SUFFIX):
            continue  # made with their blocks
        if not name.endswith(BLOCKS_SUFFIX):
            made[name] = _only_head(name, read)
            continue
        try:
            made |= _sum(name, holding)
        except InputError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise InputError(f"{_title(pairs)}:\n{indented(faults)}")
    bases = {adapter.base for adapter, _ in pairs}
    return _in_memory(_title(pairs), made, bases.pop() if len(bases) == 1 else None)


def _check(pairs: Sequence[tuple[SwapAdapter, float]]) -> None:
    if not pairs:
        raise InputError("no adapters were given to combine; give at least one")
    for adapter, weight in pairs:
        if not math.isfinite(weight):
            raise InputError(f"{adapter.path}: its weight is {weight}; give a finite number")
    marks = {adapter.base: adapter.path for adapter, _ in pairs if adapter.base is not None}
    if len(marks) > 1:
        shown = ", ".join(f"{path} (mark {mark:08x})" for mark, path in marks.items())
        raise InputError(f"adapters for different bases cannot be summed: {shown}")
    types: dict[str, tuple[str, Path]] = {}
    for adapter, _ in pairs:
        for name, kind in adapter.types.items():
            first = types.setdefault(name, (kind, adapter.path))
            if first[0] != kind:
                raise InputError(
                    f"{name} is a {first[0]} in {first[1]}, a {kind} in {adapter.path}; adapters must be exported with "
                    "the same --precision and --block-dtype to be summed"
                )


def _sum(name: str, holding: Sequence[tuple[Values, float]]) -> Values:
    """One module's blocks, and their scales where they are int8."""
    scales = name.removesuffix(BLOCKS_SUFFIX) + SCALES_SUFFIX
    kind = holding[0][0][name].dtype
    if kind == np.int8:
        total = add([(from_int8(values[name], values[scales]), weight) for values, weight in holding])
        _finite(total)
        codes, steps = to_int8(total)
        error = relative_error(total, from_int8(codes, steps))
        if error > MOST_ERROR:
            log.warning(
                "%s: the sum is off by %.2g of its size in int8; export with a wider --block-dtype", name, error
            )
        return {name: codes, scales: steps}
    with np.errstate(over="ignore"):  # an error of its own
        rounded = add([(values[name], weight) for values, weight in holding]).astype(kind)
    _finite(rounded)
    return {name: rounded}


def _finite(blocks: Array) -> None:
    if not np.isfinite(blocks).all():
        raise InputError(f"the sum is too large for {blocks.dtype}; give smaller weights")


def _only_head(name: str, read: Sequence[tuple[SwapAdapter, float, Values]]) -> Array:
    holding = [(adapter, values[name]) for adapter, _, values in read if name in values]
    if any(not np.array_equal(value, holding[0][1]) for _, value in holding):
        raise InputError(
            f"{name}: {', '.join(str(adapter.path) for adapter, _ in holding)} each bring a classification head of "
            "their own, and heads cannot be summed; combine adapters of which one has a head, or that share it"
        )
    return holding[0][1]


def _title(pairs: Sequence[tuple[SwapAdapter, float]]) -> str:
    return " + ".join(
        adapter.path.stem if weight == 1 else f"{weight:g} × {adapter.path.stem}" for adapter, weight in pairs
    )


def _in_memory(title: str, values: Values, base: int | None) -> SwapAdapter:
    """Values as an adapter: onnxruntime loads its adapters from files only, and maps them into memory.

    The file goes at once, its pages stay until the adapter does; on Windows, which keeps mapped files, it stays too.
    """
    with tempfile.TemporaryDirectory(prefix="diablo-export-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "sum.onnx_adapter"
        write_adapter(file, values, base)
        loaded = load_adapter(file)
    return SwapAdapter(Path(title), loaded.types, loaded.handle, base, values)
