"""bitsandbytes' 4-bit weights (nf4, fp4) in a Hugging Face checkpoint, also with double quantization.

    weight                               (out · in / 2, 1) bytes, two codes in each, the first in the high bits
    weight.absmax                        float32 (groups,): each group's scale; or with double quantization uint8 codes
    weight.quant_map                     float32 (16,): what each code is worth
    weight.nested_absmax, .nested_quant_map   double quantization: scales and table of those codes
    weight.quant_state.bitsandbytes__…   JSON: shape, group sizes, the offset of double quantization

w = map[code] · absmax of its group. Groups are runs of the flat weight, and go on into the next row where a row is no
multiple of them. Double quantization's second level stays as it is: a group gets the nearest scale that it can express.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.adapter import AdaptedModule
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import TensorInfo
from diablo_export.errors import CheckpointError
from diablo_export.packed.grid import Change, Index, check_scales
from diablo_export.quantization import Codes, Float32, pack, unpack

MARK = "weight.quant_map"
CHANGED = ("weight", "weight.absmax")
STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
KEPT = ("weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *STATES)
_RATIOS = np.linspace(0.8, 1.1, 7, dtype=np.float32)  # of the scale that just holds a group's largest weight
_FITS = 2  # alternations of codes and scale
_AT_ONCE = 1 << 21  # weights per step
_WORTHS = 16  # of a code of 4 bits

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scales:
    """One scale a group, as it is stored: floats, or codes of a table."""

    stored: Array  # (groups,): float32, or uint8 codes
    table: Float32 | None = None  # (256,): what those are worth
    scales: Float32 | None = None  # (⌈groups / size⌉,)
    size: int = 1
    offset: float = 0.0

    def values(self, groups: Index) -> Float32:
        """The scales of some groups."""
        if self.table is None or self.scales is None:
            return np.asarray(self.stored[groups], np.float32)
        return self._worth(self.stored[groups], groups)

    def nearest(self, wanted: Float32, groups: Index) -> Array:
        """How scales like `wanted` are stored for these groups."""
        if self.table is None or self.scales is None:
            return wanted
        steps = self.scales[groups // self.size]
        return _nearest(self.table, (wanted - np.float32(self.offset)) / np.where(steps == 0, np.inf, steps))

    def worth(self, stored: Array, groups: Index) -> Float32:
        """What stored scales of these groups are worth."""
        return np.asarray(stored, np.float32) if self.table is None else self._worth(stored, groups)

    def _worth(self, codes: Array, groups: Index) -> Float32:
        assert self.table is not None and self.scales is not None
        return np.asarray(self.table[codes] * self.scales[groups // self.size] + np.float32(self.offset), np.float32)


@dataclass(frozen=True)
class LookedUp:
    """One weight whose codes are looked up in a table."""

    codes: Codes  # (groups, size), of the flat weight
    absmax: Scales
    table: Float32  # (16,)
    shape: tuple[int, int]  # (out_features, in_features)

    def values(self) -> Float32:
        """The whole weight, (out_features, in_features)."""
        scaled = self.table[self.codes] * self.absmax.values(np.arange(len(self.codes)))[:, None]
        return np.asarray(scaled.reshape(-1)[: math.prod(self.shape)].reshape(self.shape), np.float32)

    def values_at(self, rows: Index, columns: Index) -> Float32:
        """The weights at these positions."""
        flat = rows * self.shape[1] + columns
        group = flat // self.codes.shape[1]
        return np.asarray(self.table[self.codes.reshape(-1)[flat]] * self.absmax.values(group), np.float32)

    def with_blocks(self, module: AdaptedModule, method: str) -> tuple[LookedUp, Change]:
        """The weight with the module's blocks added; arguments as `PackedGrid.with_blocks` has them."""
        codes, stored = self.codes.copy(), self.absmax.stored.copy()
        change = Change(4, groups=len(codes), codes=codes.size)
        for first, delta, under in self._steps(module):
            met = np.flatnonzero(under.any(1))
            groups = first + met
            old, scale = self.codes[groups], self.absmax.values(groups)
            before = self.table[old] * scale[:, None]
            new, held = self._chosen(before + delta[met], groups, method)
            codes[groups], stored[groups] = new, held
            after = self.table[new] * self.absmax.worth(held, groups)[:, None]
            change.touched += len(groups)
            change.changed += int((new != old).sum())
            change.see(after - before, delta[met], under[met])
        return replace(self, codes=codes, absmax=replace(self.absmax, stored=stored)), change

    def _steps(self, module: AdaptedModule) -> Iterator[tuple[int, Float32, Bools]]:
        """Runs of whole groups: the first one's number, what blocks add to them, which weights they meet."""
        outputs, inputs = self.shape
        size = self.codes.shape[1]
        whole = size // math.gcd(size, inputs)  # rows after which a group ends with a row
        step = max(1, _AT_ONCE // (inputs * whole)) * whole
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            delta, under = np.zeros((stop - start, inputs), np.float32), np.zeros((stop - start, inputs), np.bool_)
            for block, (columns, rows) in enumerate(module.shape.slices()):
                first, last = max(rows.start, start), min(rows.stop, stop)
                if first < last and columns.start < columns.stop:
                    here = slice(first - rows.start, last - rows.start)
                    values = module.blocks[block, : columns.stop - columns.start, here].T
                    delta[first - start : last - start, columns] = values
                    under[first - start : last - start, columns] = True
            short = -delta.size % size  # the last group of all may be short
            flat = [np.pad(each.reshape(-1), (0, short)).reshape(-1, size) for each in (delta, under)]
            yield start * inputs // size, flat[0], flat[1].astype(np.bool_)

    def _chosen(self, target: Float32, groups: Index, method: str) -> tuple[Codes, Array]:
        """Codes and stored scales for some groups: of the scales tried, the ones that leave least error."""
        held = self.absmax.stored[groups]
        scale = self.absmax.worth(held, groups)
        codes = self._rounded(target, scale)
        if method == "rtn":
            return codes, held
        least = ((self.table[codes] * scale[:, None] - target) ** 2).sum(1)
        largest = np.abs(target).max(1)
        for ratio in _RATIOS:
            wanted = largest * ratio
            for _ in range(_FITS):
                trial = self.absmax.nearest(wanted, groups)
                scale = self.absmax.worth(trial, groups)
                found = self._rounded(target, scale)
                values = self.table[found]
                error = ((values * scale[:, None] - target) ** 2).sum(1)
                wins = error < least
                codes, held = np.where(wins[:, None], found, codes), np.where(wins, trial, held)
                least = np.where(wins, error, least)
                square = (values**2).sum(1)
                wanted = np.divide((target * values).sum(1), square, out=scale.copy(), where=square > 0)
        return codes, held

    def _rounded(self, target: Float32, scale: Float32) -> Codes:
        return _nearest(self.table, target / np.where(scale == 0, np.float32(np.inf), scale)[:, None])


def fault(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of this quantization_config cannot be read, or None."""
    return None if config.get("load_in_4bit") else "quantized with bitsandbytes in 8 bits, where 4 can be read"


def sizes(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[int, int]:
    """(out_features, in_features)."""
    outputs, inputs = _state({name: info.read() for name, info in infos.items() if name in STATES})["shape"]
    return int(outputs), int(inputs)


def unpacked(tensors: Mapping[str, Array], config: Mapping[str, Any]) -> LookedUp:
    """The codes, scales and table of one module.

    Raises:
        CheckpointError: not as many scales as groups, or scales or a table that are no numbers.
    """
    state = _state(tensors)
    outputs, inputs = (int(size) for size in state["shape"])
    size, count = int(state["blocksize"]), outputs * inputs
    codes = unpack(_swapped(tensors["weight"].reshape(-1).view(np.uint8)), 4, count)
    table = tensors["weight.quant_map"]
    if table.shape != (_WORTHS,) or not np.isfinite(table).all():
        raise CheckpointError(
            f"its quant_map is no table of {_WORTHS} numbers (shape {table.shape}); copy the model again"
        )
    codes = np.pad(codes, (0, -count % size), constant_values=np.abs(table).argmin()).reshape(-1, size)  # worth 0
    absmax = Scales(tensors["weight.absmax"])
    if absmax.stored.shape != (len(codes),):
        raise CheckpointError(
            f"codes of {len(codes)} groups of {size} and absmax {absmax.stored.shape} do not fit together"
        )
    if "weight.nested_absmax" in tensors:
        absmax = Scales(
            tensors["weight.absmax"], tensors["weight.nested_quant_map"], tensors["weight.nested_absmax"],
            int(state["nested_blocksize"]), float(state["nested_offset"]),
        )  # fmt: skip
    check_scales(absmax.values(np.arange(len(codes))))
    return LookedUp(codes, absmax, table, (outputs, inputs))


def packed(looked: LookedUp, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of `CHANGED`; the inverse of `unpacked`."""
    stored = tensors["weight"]
    raw = stored.reshape(-1).view(np.uint8).copy()
    made = _swapped(pack(looked.codes.reshape(-1)[: math.prod(looked.shape)], 4))
    raw[: len(made)] = made
    return {"weight": raw.view(stored.dtype).reshape(stored.shape), "weight.absmax": looked.absmax.stored}


def _state(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """What bitsandbytes wrote as JSON into a tensor of bytes."""
    found: dict[str, Any] = json.loads(bytes(next(tensors[name] for name in STATES if name in tensors)))
    return found


def _swapped(raw: Codes) -> Codes:
    """Bytes with their halves exchanged."""
    return raw << np.uint8(4) | raw >> np.uint8(4)


def _nearest(table: Float32, values: Array) -> Codes:
    """For each value the place of the nearest entry of a table in any order."""
    order = np.argsort(table, kind="stable")
    ordered = table[order]
    between = (ordered[1:] + ordered[:-1]) / 2
    return order[np.searchsorted(between, values)].astype(np.uint8)
