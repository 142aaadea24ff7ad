"""How much of the blocks the type of a model's weights leaves, and a word where that is little."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array, shape_of
from diablo_export.console import log

_SHOWN = 5
_KEPT = (0.9, 1.1)  # of the blocks, within which nothing is said


class Kept:
    """What is left of blocks after they were added to weights and the sums rounded, piece by piece."""

    def __init__(self) -> None:
        self.left = self.wanted = 0.0

    def add(self, before: Array, after: Array, blocks: Array) -> None:
        """Weights without blocks and with them, both as they are stored, and the blocks; wide floats of one shape."""
        self.left += float(np.vdot(after - before, blocks))
        self.wanted += float(np.vdot(blocks, blocks))

    @property
    def gain(self) -> float:
        """<what was added after rounding, blocks> / <blocks, blocks>: 1 where rounding took nothing."""
        return self.left / self.wanted if self.wanted else 1.0


def gain_in(dtype: npt.DTypeLike, weight: Array, blocks: Array) -> float:
    """`Kept.gain` of blocks and a weight (out_features, in_features) that are stored as `dtype`, their base as well."""
    kept = Kept()
    for block, (inputs, outputs) in enumerate(shape_of(blocks, *weight.shape[::-1]).slices()):
        before: Array = weight[outputs, inputs].astype(np.float32)
        added: Array = blocks[block, : before.shape[1], : before.shape[0]].T.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever writes the sum refuses it
            base, merged = (values.astype(dtype).astype(np.float32) for values in (before, before + added))
            kept.add(base, merged, added)
    return kept.gain


def lossy(modules: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a manifest's modules whose blocks rounding changed by a tenth or more."""
    return [module for module in modules if not _KEPT[0] <= module.get("weight_gain", 1.0) <= _KEPT[1]]


def warn_of_rounding(lost: Sequence[Mapping[str, Any]], what: str, way: str) -> None:
    """Name the modules that `lossy` gave, `what` they were rounded to, and another `way`; nothing without any."""
    if lost:
        said = ", ".join(f"{module['name']} keeps {module['weight_gain']:.0%}" for module in lost[:_SHOWN])
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        log.warning("rounding to %s changes the blocks: %s%s; %s", what, said, more, way)
