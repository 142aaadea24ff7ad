"""A checkpoint of a mixture of experts as transformers loads it: parameters renamed, the experts' matrices stacked.

Mixtral's experts lie one by one in its files and are one parameter of the model, (experts, rows, columns). How they get
there is read from the table that transformers loads them by. Only names are read; the matrices come expert by expert.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import DTYPES, Checkpoint, TensorInfo
from diablo_export.errors import ExportError

# all that is known here of what transformers does: stack the experts, those of a pair (gate, up) above each other
_KNOWN = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


@dataclass(frozen=True)
class StackedInfo(TensorInfo):
    """Matrices as one tensor (experts, rows, columns); `start` and `stop` are bytes of that, not of a file."""

    experts: tuple[tuple[TensorInfo, ...], ...] = ()  # of each the matrices that lie above each other

    def read(self) -> Array:
        """The experts from `start` to `stop`."""
        size = self.nbytes // self.shape[0]
        wanted = self.experts[self.start // size : self.stop // size]
        return np.stack([np.concatenate([part.read() for part in parts]) for parts in wanted])


def stacked_view(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the names and shapes that the loaded model has; one without experts as it is.

    Raises:
        ExportError: transformers makes its experts in a way that is not known here.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = (
        get_checkpoint_conversion_mapping(  # type: ignore[no-untyped-call]
            checkpoint.config.get("model_type")
        )
        or []
    )
    if not any("experts" in target for change in changes for target in change.target_patterns):
        return checkpoint
    names = [change for change in changes if isinstance(change, WeightRenaming)]
    stacks = [change for change in changes if isinstance(change, WeightConverter)]
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, list[tuple[int, int, TensorInfo]]] = {}
    for stored in checkpoint:
        name, pattern = rename_source_key(stored.name, names, stacks)
        if pattern is None:
            tensors[name] = stored
        else:
            expert = int(re.findall(r"\.(\d+)\.", stored.name)[-1])
            parts.setdefault(name, []).append((expert, _place(checkpoint, pattern, stacks), stored))
    return replace(checkpoint, tensors=tensors | {name: _stack(name, found) for name, found in parts.items()})


def _place(checkpoint: Checkpoint, pattern: str, stacks: list[Any]) -> int:
    """Which of the matrices above each other those of this pattern are."""
    stack = next(each for each in stacks if pattern in each.source_patterns)
    if [(type(done).__name__, getattr(done, "dim", None)) for done in stack.operations] not in _KNOWN:
        raise ExportError(
            f"{checkpoint.folder}: transformers makes {', '.join(stack.target_patterns)} of {pattern} in a way of its "
            "own. merge --format hf can take it"
        )
    return list(stack.source_patterns).index(pattern)


def _stack(name: str, parts: list[tuple[int, int, TensorInfo]]) -> StackedInfo:
    experts: dict[int, list[TensorInfo]] = {}
    for expert, _, stored in sorted(parts, key=lambda part: part[:2]):
        experts.setdefault(expert, []).append(stored)
    first = experts[min(experts)]
    shape = (len(experts), sum(part.shape[0] for part in first), *first[0].shape[1:])
    size = math.prod(shape) * DTYPES[first[0].dtype].itemsize
    return StackedInfo(
        name, first[0].file, first[0].dtype, shape, 0, size, tuple(tuple(found) for found in experts.values())
    )
