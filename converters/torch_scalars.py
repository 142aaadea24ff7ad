"""Numbers that a model makes into tensors as it runs, kept when it is traced on the meta device.

`torch.tensor(-1e9, device=x.device)`, as GPT-Neo masks with, would be a constant without a value there, and so would
the index of `x[..., [-1], :]`, as Falcon takes keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ScalarsKept(TorchFunctionMode):
    """While it is entered, a tensor of one number is filled in the graph, and a list of one index is a slice."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See torch.overrides."""
        if func is torch.tensor and isinstance(args[0], bool | int | float):
            return torch.full((), *args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            return func(args[0], tuple(map(_slice, args[1])))
        return func(*args, **(kwargs or {}))


def _slice(index: Any) -> Any:
    """A list of one number as the slice that takes the same."""
    if not (isinstance(index, list) and len(index) == 1 and type(index[0]) is int):
        return index
    return slice(index[0], index[0] + 1 or None)
