"""A weight of integer codes as Hugging Face checkpoints pack them, unpacked, and an adapter's blocks merged into it.

w[n, k] = (code[n, k] − zero[n, g]) · scale[n, g], where g is the group of input k: runs of inputs, or any others, as
GPTQ's activation order makes them. Only groups that meet a block change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.adapter import AdaptedModule
from diablo_export.blockdiag import Array
from diablo_export.errors import CheckpointError
from diablo_export.quantization import Codes, Float32
from diablo_export.requantize import Grid, nearest, refitted

METHODS = ("refit", "rtn")
_MOST = 0.5  # of a group
_CUT = 0.51  # of a step: rounding alone is off by a half
_AT_ONCE = 1 << 21  # weights per step: bounds the temporaries

Index = npt.NDArray[np.int64]


@dataclass
class Change:
    """What merging did to one weight."""

    bits: int
    touched: int = 0  # groups that meet a block
    groups: int = 0  # all of them
    changed: int = 0  # codes that are others now
    codes: int = 0  # all of them
    disturbed: int = 0  # weights that no block meets whose value changed
    _dots: Array = field(default_factory=lambda: np.zeros(3))  # <effect, delta>, <effect, effect>, <delta, delta>

    def see(self, effect: Array, delta: Array, under: Array) -> None:
        """Count what was done to some weights; `under`: those that a block meets."""
        self.disturbed += int(((effect != 0) & ~under).sum())
        self._dots += [float(np.vdot(*pair)) for pair in ((effect, delta), (effect, effect), (delta, delta))]

    @property
    def gain(self) -> float:
        """How much of the blocks is in the weights: <effect, delta> / <delta, delta>."""
        along, _, wanted = self._dots
        return float(along / wanted) if wanted else 1.0

    def describe(self) -> dict[str, Any]:
        """As a manifest's entry says it."""
        along, effect, wanted = self._dots
        return {
            "bits": self.bits,
            "weight_gain": self.gain,
            "weight_cosine": float(along / np.sqrt(effect * wanted)) if effect and wanted else 0.0,
            "touched_groups": self.touched,
            "codes_changed": self.changed,
            "codes": self.codes,
            "disturbed_weights": self.disturbed,
            "why": f"{self.touched} of {self.groups} groups, all that a block meets",
        }


def check_words(tensors: Mapping[str, Array]) -> None:
    """Refuse codes and zero points in integers of another width than GPTQ's and AWQ's usual one.

    Raises:
        CheckpointError: names the tensor and its type.
    """
    for name in ("qweight", "qzeros"):
        if tensors[name].dtype != np.int32:
            raise CheckpointError(f"{name} holds integers of {tensors[name].dtype}, where int32 can be read")


def check_scales(scales: Array) -> None:
    """Refuse scales that make no numbers.

    Raises:
        CheckpointError: says how many do not.
    """
    bad = int((~np.isfinite(scales)).sum())
    if bad:
        raise CheckpointError(
            f"of its {scales.size} scales, {bad} are NaN or infinite; quantize or copy the model again"
        )


@dataclass(frozen=True)
class PackedGrid:
    """One unpacked weight."""

    codes: Codes  # (out, in)
    scales: Float32  # (out, groups)
    zeros: Codes  # (out, groups)
    group_of: Index  # (in,)
    bits: int
    dtype: npt.DTypeLike  # what scales are stored in
    least_zero: int = 0  # the smallest zero point that can be stored

    def __post_init__(self) -> None:
        outputs, inputs = self.shape
        groups = self.scales.shape[-1]
        if not self.scales.shape == self.zeros.shape == (outputs, groups) or self.group_of.shape != (inputs,):
            raise CheckpointError(
                f"codes of {outputs} outputs and {inputs} inputs, scales {self.scales.shape}, zero points "
                f"{self.zeros.shape} and groups of {self.group_of.shape} inputs do not fit together"
            )
        if self.group_of.min() < 0 or self.group_of.max() >= groups:
            raise CheckpointError(
                f"inputs of the groups {self.group_of.min()} to {self.group_of.max()}, and scales of {groups} groups"
            )
        check_scales(self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def values(self) -> Float32:
        """The whole weight, (out_features, in_features)."""
        steps = self.codes.astype(np.float32) - self.zeros[:, self.group_of]
        return np.asarray(steps * self.scales[:, self.group_of], np.float32)

    def members(self) -> Index:
        """(groups, size): the inputs of each group; in_features where a group has fewer."""
        groups, inputs = self.scales.shape[1], self.shape[1]
        order = np.argsort(self.group_of, kind="stable")
        counts = np.bincount(self.group_of, minlength=groups)
        found = np.full((groups, max(1, int(counts.max(initial=0)))), inputs, np.int64)
        within = np.arange(inputs) - np.repeat(np.cumsum(counts) - counts, counts)
        found[self.group_of[order], within] = order
        return found

    def values_at(self, rows: Index, columns: Index) -> Float32:
        """The weights at these positions."""
        group = self.group_of[columns]
        steps = self.codes[rows, columns].astype(np.float32) - self.zeros[rows, group]
        return np.asarray(steps * self.scales[rows, group], np.float32)

    def with_blocks(self, module: AdaptedModule, method: str) -> tuple[PackedGrid, Change]:
        """The weight with the module's blocks added.

        Args:
            module: of this weight's sizes.
            method: `rtn`, to the nearest of each group's own values; or `refit`, where a group may get another scale
                and zero point if that leaves less error.
        """
        new = replace(self, codes=self.codes.copy(), scales=self.scales.copy(), zeros=self.zeros.copy())
        change = Change(self.bits, groups=self.scales.size, codes=self.codes.size)
        members = self.members()
        for blocks, inputs, rows in self._steps(module):
            groups = np.unique(self.group_of[inputs])
            columns = members[groups]  # (groups, size)
            real = columns < self.shape[1]
            old = self._part(rows, groups, columns, real)
            under = (columns >= inputs.start) & (columns < inputs.stop)
            delta = np.zeros(old.codes.shape, np.float32)
            delta[:, under] = blocks[:, columns[under] - inputs.start]
            chosen = self._chosen(old.values() + delta, old, under.mean(1) > _MOST, method)
            new.codes[rows][:, columns[real]] = chosen.codes[:, real]
            new.scales[rows, groups], new.zeros[rows, groups] = chosen.scales, chosen.zeros
            change.touched += old.scales.size
            change.changed += int((chosen.codes != old.codes)[:, real].sum())
            change.see(chosen.values() - old.values(), delta, np.broadcast_to(under, delta.shape))
        return new, change

    def _steps(self, module: AdaptedModule) -> Iterator[tuple[Array, slice, slice]]:
        """A few rows of a block after the other: what it adds (rows, inputs), its inputs, the rows."""
        for block, (inputs, outputs) in enumerate(module.shape.slices()):
            width = inputs.stop - inputs.start
            if width <= 0 or outputs.stop <= outputs.start:
                continue
            met = np.isin(self.group_of, self.group_of[inputs]).sum()
            step = max(1, _AT_ONCE // int(met))
            for start in range(outputs.start, outputs.stop, step):
                rows = slice(start, min(start + step, outputs.stop))
                here = slice(rows.start - outputs.start, rows.stop - outputs.start)
                yield module.blocks[block, :width, here].T.astype(np.float32), inputs, rows

    def _part(self, rows: slice, groups: Index, columns: Index, real: Array) -> Grid:
        """Some groups of some rows, (rows, groups, size); what pads a short group is worth 0."""
        scales, zeros = self.scales[rows, groups], self.zeros[rows, groups]
        codes = self.codes[rows][:, np.minimum(columns, self.shape[1] - 1)]
        codes = np.where(real, codes, zeros[..., None])
        return Grid(codes, scales, zeros, self.bits, bool((zeros == 2 ** (self.bits - 1)).all()))

    def _chosen(self, target: Float32, old: Grid, most: Array, method: str) -> Grid:
        """The grid for some groups; `most`: (groups,), those of which blocks meet the larger part.

        Another scale moves every weight of a group, so where blocks meet few of them it is tried only if the old
        scale cuts a weight off.
        """
        here = nearest(target, old)
        if method == "rtn":
            return here
        here = replace(here, scales=old.scales.copy(), zeros=old.zeros.copy())
        cut = np.abs(here.values() - target).max(-1) > _CUT * np.abs(old.scales)
        tried = np.nonzero(cut | most)  # (tried,) rows and groups
        part = Grid(
            old.codes[tried][:, None], old.scales[tried][:, None], old.zeros[tried][:, None], old.bits, old.symmetric
        )
        best = refitted(target[tried][:, None], part, self.dtype, positive=True)
        usable = best.zeros[:, 0] >= self.least_zero
        tried = tried[0][usable], tried[1][usable]
        here.codes[tried], here.scales[tried], here.zeros[tried] = (
            best.codes[usable, 0], best.scales[usable, 0], best.zeros[usable, 0],
        )  # fmt: skip
        return here
