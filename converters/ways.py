"""The ways to merge one module, what each costs, and what is left of the adapter in the whole with some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diablo_export.adapter import base_weight
from diablo_export.blockdiag import add_to_weight
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.grid_methods import Bench, Tried
from diablo_export.converters.grid_network import target
from diablo_export.converters.onnx_groups import scale_type
from diablo_export.converters.onnx_keep import PAGE
from diablo_export.converters.onnx_match import Match
from diablo_export.converters.plan_file import BRANCH
from diablo_export.converters.planner import Choices, Option, stored_bytes
from diablo_export.measure.sensitivity import fisher, nats
from diablo_export.measure.survival import Judge, Survival, of_outputs
from diablo_export.quantization import Float32, fresh_grid
from diablo_export.requantize import Grid, grouped

WIDE, WIDE_BITS = "int8", 8
FLOAT = "float"
_NODES = 2048  # bytes of model.onnx that a branch's nodes take
_JUDGED = 16  # sequences that sensitivities are taken on


@dataclass
class Ways:
    """The ways to merge each module of an adapter.

    Attributes:
        bench: the network and its text.
        best: the codes at the base's bits.
        float_base: where 8 bits are rounded from; None: there are none.
        found: where the modules lie in the graph.
    """

    bench: Bench
    best: Tried
    float_base: Checkpoint | None
    found: Mapping[str, Match]

    def __post_init__(self) -> None:
        bench = self.bench
        self._laid: Choices = {}
        self._grids: dict[str, tuple[Grid, Grid]] = {}
        items = bench.text.judged[:_JUDGED]
        weights = fisher(bench.made.network, items, batch_size=bench.batch, pad=bench.pad)
        self.nats = {
            name: nats(bench.layers[name], grid, bench.wanted[name], bench.moments[name], weights[name])
            for name, grid in self.best.grids.items()
        }
        for name, grid in self.best.grids.items():  # whatever method came last is not the best
            bench.layers[name].begin(grid)

    def options(self) -> list[Option]:
        """Every alternative to a merge at the base's bits."""
        found = []
        for name, grid in self.best.grids.items():
            if self.float_base is not None and grid.bits < WIDE_BITS:
                more = _pages(self.bytes(name, WIDE) - self.bytes(name), 3)
                left = 4.0 ** (grid.bits - WIDE_BITS)  # of the error's square: the step is a half for each bit
                found.append(Option(name, WIDE, more, self.nats[name] * (1 - left)))
            more = _pages(self.bytes(name, BRANCH) - self.bytes(name), 1) + _NODES
            found.append(Option(name, BRANCH, more, self.nats[name]))
        return found

    def bytes(self, name: str, choice: str | None = None) -> int:
        """Of one module's weight and blocks."""
        one, grid = self.found[name], self.best.grids.get(name)
        if grid is None:
            return int(one.module.out_features * one.module.in_features * one.pieces[0].linear.dtype.itemsize)
        out, groups, size = grid.codes.shape
        bits = WIDE_BITS if choice == WIDE else grid.bits
        weight = stored_bytes(out, groups, size, bits, grid.symmetric, np.dtype(scale_type(one)).itemsize, grid.between)
        if choice == BRANCH:
            weight += one.module.blocks.size * int(one.pieces[0].linear.dtype.itemsize)
        return weight

    def measure(self, choices: Choices) -> Survival:
        """Survival with these modules at 8 bits or as branches, all others at the base's bits."""
        for name in self.best.grids:
            if choices.get(name) != self._laid.get(name):
                base, grid, _ = self._of(name, choices.get(name))
                self.bench.layers[name].lay(base, None if choices.get(name) == BRANCH else grid)
        self._laid = dict(choices)
        if WIDE not in choices.values():
            return self.bench.judge.measure()
        # 8 bits are nearer to the base, too: base and branch are those of this plan
        bench = self.bench
        return Judge(bench.made.network, bench.text.judged, bench.batch, bench.pad, truth=bench.text.true).measure()

    def rows(self, choices: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What the plan's reader wants to know of each module."""
        found = {}
        for name, choice in choices.items():
            gain, cosine = 1.0, 1.0
            if choice not in (BRANCH, FLOAT):
                base, grid, wanted = self._of(name, choice)
                gain, cosine = of_outputs(self.bench.layers[name].shape, base, grid, wanted, self.bench.moments[name])
            found[name] = {"bytes": self.bytes(name, choice), "gain": gain, "cosine": cosine}
            found[name] |= {"nats": self.nats[name]} if name in self.nats else {}
        return found

    def _of(self, name: str, choice: str | None) -> tuple[Grid, Grid, Float32]:
        """A module's grid without and with the adapter, and what it should hold."""
        base, grid, wanted = self.bench.made.grids[name], self.best.grids[name], self.bench.wanted[name]
        if choice != WIDE or base.bits == WIDE_BITS:
            return base, grid, wanted
        base, grid = self._wide(name)
        return base, grid, target(self.bench.adapter.modules[name], base)

    def _wide(self, name: str) -> tuple[Grid, Grid]:
        """A module's float weight, and that with its blocks, rounded to 8 bits."""
        if name not in self._grids:
            assert self.float_base is not None
            like, dtype = self.bench.made.grids[name], scale_type(self.found[name])
            weight = base_weight(self.float_base, name)
            merged = np.asarray(add_to_weight(weight, self.bench.adapter.modules[name].blocks), np.float32)
            self._grids[name] = _rounded(weight, like, dtype), _rounded(merged, like, dtype)
        return self._grids[name]


def _rounded(weight: Float32, like: Grid, dtype: Any) -> Grid:
    codes, scales, zeros = fresh_grid(grouped(weight, like.codes.shape[-1]), WIDE_BITS, like.symmetric)
    return Grid(codes, scales, zeros, WIDE_BITS, like.symmetric).stored_as(dtype)


def _pages(size: int, initializers: int) -> int:
    """So many bytes, at most, with what is left empty before each initializer, which begins at a page."""
    return (-(-size // PAGE) + initializers) * PAGE
