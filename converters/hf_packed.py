"""Quantized modules of a Hugging Face checkpoint with blocks merged in, each written back in the format that it has.

A module's tensors are made together, when the first of them is asked for, wherever its files have them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint
from diablo_export.packed.grid import Change
from diablo_export.packed.modules import Stored, is_very, likeness_fault, stored


@dataclass
class PackedModule:
    """One quantized module that an adapter has blocks for."""

    module: AdaptedModule
    stored: Stored
    method: str
    change: Change | None = None  # once it is merged
    very: bool = True  # and not only like the weight that the blocks were trained beside; likewise
    _made: dict[str, Array] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def changed(self) -> dict[str, str]:
        """The stored names of the tensors that a merge writes, with what follows the prefix."""
        changed = self.stored.codec.CHANGED
        return {info.name: suffix for suffix, info in self.stored.infos.items() if suffix in changed}

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
        tensors = self.stored.read()
        grid = self.stored.unpacked(tensors)
        if likeness_fault(self.module, grid):
            raise WrongBaseError(self.module.name)
        self.very = is_very(self.module, grid)
        merged, self.change = grid.with_blocks(self.module, self.method)
        self._made = self.stored.codec.packed(merged, tensors, self.stored.config)


class WrongBaseError(Exception):
    """A module whose values are not those of the adapter's base; the caller says so for all of them."""


def packed_modules(checkpoint: Checkpoint, adapter: Adapter, method: str = "refit") -> dict[str, PackedModule]:
    """The adapted modules that are quantized in the checkpoint, by name."""
    found = {name: stored(checkpoint, name) for name in adapter.modules}
    return {name: PackedModule(adapter.modules[name], one, method) for name, one in found.items() if one is not None}
