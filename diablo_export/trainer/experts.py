"""Mixtures of experts as transformers 5 has them: the weights of a layer's experts in two parameters.

`gate_up_proj` is (experts, 2 · intermediate, hidden) and `down_proj` (experts, hidden, intermediate), or both with the
last two turned (`is_transposed`); gate lies above up, or their rows by turns (not `is_concatenated`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from diablo_export.base_grid import BaseGrid
from diablo_export.quantization import Float32, dequantize, fitting_group

WEIGHTS = ("gate_up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether these are experts that transformers lets others compute (`use_experts_implementation`)."""
    return all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "_apply_gate"))


@torch.no_grad()
def set_rounded(experts: Any, name: str, rounded: Callable[[int], Float32]) -> None:
    """Give a weight of the experts other values.

    Args:
        experts: the module.
        name: of the parameter, one of WEIGHTS.
        rounded: the weight of one expert, (out_features, in_features), gate and up by turns.
    """
    old = experts.get_parameter(name)
    new = torch.empty_like(old)
    for expert in range(len(old)):
        values = rounded(expert)
        if name == WEIGHTS[0] and experts.is_concatenated:
            values = np.concatenate([values[::2], values[1::2]])
        values = values.T if experts.is_transposed else values
        new[expert] = torch.from_numpy(np.ascontiguousarray(values))
    setattr(experts, name, nn.Parameter(new, requires_grad=False))


def weight_of(experts: Any, name: str, expert: int) -> Float32:
    """The weight of one expert as `set_rounded` takes it."""
    values: Float32 = experts.get_parameter(name)[expert].detach().float().cpu().numpy()
    values = values.T if experts.is_transposed else values
    if name == WEIGHTS[0] and experts.is_concatenated:
        return np.stack(np.split(values, 2), axis=1).reshape(values.shape)
    return values


def round_experts(network: nn.Module, grid: BaseGrid) -> None:
    """Round the experts of a network to a grid as an export does, and keep them as floats: the same numbers."""
    for experts in filter(is_experts, network.modules()):
        size = fitting_group(grid.group_size, [weight_of(experts, name, 0).shape[1] for name in WEIGHTS])
        if size is not None:
            own = replace(grid, group_size=size)
            for name in WEIGHTS:
                set_rounded(experts, name, partial(_rounded, experts, name, own))


def _rounded(experts: nn.Module, name: str, grid: BaseGrid, expert: int) -> Float32:
    return dequantize(grid.quantize(weight_of(experts, name, expert)))
