"""Modules of a Hugging Face checkpoint that are quantized: which they are, and their tensors with blocks merged in.

Each is written back in the format that it has. A module's tensors are made together, when the first of them is asked
for, wherever its files have them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from diablo_export.adapter import AdaptedModule, Adapter, refuse_base
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint, TensorInfo
from diablo_export.converters import packed_awq, packed_bnb, packed_compressed, packed_gptq
from diablo_export.converters.packed_grid import Change
from diablo_export.errors import CheckpointError
from diablo_export.fingerprint import SAME_WEIGHT, positions

FORMATS: Mapping[str, ModuleType] = {
    "gptq": packed_gptq,
    "awq": packed_awq,
    "compressed-tensors": packed_compressed,
    "bitsandbytes": packed_bnb,
}


@dataclass
class PackedModule:
    """One quantized module that an adapter has blocks for."""

    module: AdaptedModule
    prefix: str  # of its tensors in the checkpoint
    infos: dict[str, TensorInfo]  # by what follows the prefix
    codec: ModuleType
    config: Mapping[str, Any]
    method: str
    change: Change | None = None  # once it is merged
    _made: dict[str, Array] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def changed(self) -> dict[str, str]:
        """The stored names of the tensors that a merge writes, with what follows the prefix."""
        return {info.name: suffix for suffix, info in self.infos.items() if suffix in self.codec.CHANGED}

    def size_fault(self) -> str | None:
        """Why the stored weight is not of the module's sizes, or None."""
        wanted, found = (self.module.out_features, self.module.in_features), self.codec.sizes(self.infos, self.config)
        if found == wanted:
            return None
        return f"the model's weight is {list(found)}, the adapter's is {list(wanted)} (out, in)"

    def likeness_fault(self) -> str | None:
        """Why the stored values are not those of the adapter's base, or None."""
        return self._unlike(self._unpacked(self._read()))

    def tensor(self, suffix: str) -> Array:
        """A tensor of the merged module; each can be had once.

        Raises:
            WrongBaseError: its values are not those of the adapter's base.
        """
        with self._lock:
            if suffix not in self._made:
                self._merge()
            return self._made.pop(suffix)

    def _merge(self) -> None:
        tensors = self._read()
        grid = self._unpacked(tensors)
        if self._unlike(grid):
            raise WrongBaseError(self.module.name)
        merged, self.change = grid.with_blocks(self.module, self.method)
        self._made = self.codec.packed(merged, tensors, self.config)

    def _read(self) -> dict[str, Array]:
        return {suffix: info.read() for suffix, info in self.infos.items()}

    def _unpacked(self, tensors: dict[str, Array]) -> Any:
        try:
            return self.codec.unpacked(tensors, self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.module.name}: {error}") from error

    def _unlike(self, grid: Any) -> str | None:
        mark = self.module.fingerprint
        if mark is None:
            return None
        likeness = mark.similarity(grid.values_at(*positions(*grid.shape)))
        if likeness >= SAME_WEIGHT:
            return None
        return f"has other values than the base weight (cosine of 64 samples {likeness:.2f})"


class WrongBaseError(Exception):
    """A module whose values are not those of the adapter's base; the caller says so for all of them."""


def refuse_unreadable(checkpoint: Checkpoint) -> None:
    """Refuse a quantized checkpoint in a format that cannot be merged into; a float one passes.

    Raises:
        CheckpointError: names the format and the ones that can.
    """
    config = checkpoint.config.get("quantization_config")
    if not config:
        return
    method = config.get("quant_method", "an unnamed method") if isinstance(config, dict) else "?"
    codec = FORMATS.get(method)
    fault = codec.fault(config) if codec else f"quantized with {method}, where {', '.join(FORMATS)} can be merged into"
    if fault:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: {fault}; give the float model it was made from "
            "(merge --quantize int4 then quantizes base and blocks together)"
        )


def check_base(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Refuse a checkpoint that is not the adapter's base, in float or quantized, as `Adapter.check_base` does.

    Raises:
        AdapterError: lists every module that is missing, has other sizes, or other values.
        CheckpointError: it is quantized in a way that is not known here.
    """
    refuse_unreadable(checkpoint)
    packed = packed_modules(checkpoint, adapter)
    told = {name: one.size_fault() or one.likeness_fault() for name, one in packed.items()}
    refuse_base(adapter, str(checkpoint.folder), [f"{name}: {fault}" for name, fault in told.items() if fault])
    floats = {name: module for name, module in adapter.modules.items() if name not in packed}
    replace(adapter, modules=floats).check_base(checkpoint)


def packed_modules(checkpoint: Checkpoint, adapter: Adapter, method: str = "refit") -> dict[str, PackedModule]:
    """The adapted modules that are quantized in the checkpoint, by name."""
    found = {name: _packed_module(checkpoint, module, method) for name, module in adapter.modules.items()}
    return {name: one for name, one in found.items() if one is not None}


def _packed_module(checkpoint: Checkpoint, module: AdaptedModule, method: str) -> PackedModule | None:
    """The module's tensors in a quantized checkpoint; None where it is not quantized."""
    config = checkpoint.config.get("quantization_config")
    codec = FORMATS.get(config.get("quant_method", "")) if isinstance(config, dict) else None
    mark = codec and checkpoint.find(f"{module.name}.{codec.MARK}")
    if codec is None or mark is None or not isinstance(config, dict):
        return None
    prefix = mark.name.removesuffix(codec.MARK)
    names = {suffix: checkpoint.tensors.get(prefix + suffix) for suffix in (*codec.CHANGED, *codec.KEPT)}
    infos = {suffix: info for suffix, info in names.items() if info is not None}
    return PackedModule(module, prefix, infos, codec, config, method)
