"""A base on the grid that ships, its weights packed.

The numbers are those of an export, bit for bit: `quantization.quantize` of the checkpoint's weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo_export.base_grid import BaseGrid
from diablo_export.console import progress
from diablo_export.quantization import dequantize
from diablo_export.trainer.experts import round_experts
from diablo_export.trainer.layer import is_linear
from diablo_export.trainer.packed_layer import QuantizedLinear, oriented


def pack_base(network: nn.Module, grid: BaseGrid, leave: Collection[str] = ()) -> int:
    """Replace every linear layer of a network, also those inside DiaBlo layers, by its packed form.

    Args:
        network: its float weights go as their layers are replaced; those that embeddings share stay.
        grid: of all of them.
        leave: module paths that stay float, such as a head that is trained whole.

    Returns:
        What the packed weights take, in bytes.
    """
    round_experts(network, grid)
    total = 0
    for parent, leaf, linear in _linears(network, leave):
        packed = QuantizedLinear.from_linear(linear, grid)
        setattr(parent, leaf, packed)
        total += sum(buffer.nbytes for buffer in (packed.codes, packed.scales, packed.zeros) if buffer is not None)
    return total


@torch.no_grad()
def round_base(network: nn.Module, grid: BaseGrid, leave: Collection[str] = ()) -> None:
    """Round every linear layer's weight to the grid and keep it as floats: the same numbers, for whoever reads them."""
    round_experts(network, grid)
    for _, _, linear in _linears(network, leave):
        old = linear.get_parameter("weight")
        values = dequantize(grid.quantize(oriented(linear)))
        stored = torch.from_numpy(np.ascontiguousarray(values.T if isinstance(linear, Conv1D) else values))
        # a parameter of its own: a tied one is the embedding's too, which an export keeps in float
        linear.weight = nn.Parameter(stored.to(old.device, old.dtype), requires_grad=False)


def _linears(network: nn.Module, leave: Collection[str]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each linear layer that an export quantizes, and where it hangs."""
    found = [name for name, module in network.named_modules() if is_linear(module) and name not in leave]
    with progress("quantizing", len(found)) as advance:
        for name in found:
            parent, _, leaf = name.rpartition(".")
            owner = network.get_submodule(parent)
            yield owner, leaf, owner.get_submodule(leaf)
            advance(1)
