"""Numbers that a model makes into tensors as it runs, kept when it is traced on the meta device.

`torch.tensor(-1e9, device=x.device)`, as GPT-Neo masks with, would be a constant without a value there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ScalarsKept(TorchFunctionMode):
    """While it is entered, a tensor of one number is filled in the graph with that number."""

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
        return func(*args, **(kwargs or {}))
