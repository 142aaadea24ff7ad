"""The Hugging Face network of an int4 ONNX model: adapted layers in three states, all others with the file's values.

What is optimised must be what ships, so every linear layer that the graph holds quantized gets the very values of the
file, also the output head and layers without blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import Array, add_to_weight
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log
from diablo_export.converters.budget import place
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_groups import quantized, read
from diablo_export.converters.onnx_match import Match, match
from diablo_export.errors import MatchError
from diablo_export.fingerprint import fingerprint
from diablo_export.measure.experts import lay_experts
from diablo_export.measure.places import Graph as Places
from diablo_export.quantization import Float32
from diablo_export.requantize import Grid, grouped
from diablo_export.trainer.grid import GridLinear
from diablo_export.trainer.layer import features, is_linear
from diablo_export.trainer.model import attach, load_base, replace_module


@dataclass(frozen=True)
class GridNetwork:
    """A network that can be run as the int4 base, as base + branch, and as merged.

    Attributes:
        network: the Hugging Face model, its adapted layers replaced by `GridLinear`.
        tokenizer: its tokenizer.
        grids: the base's grid of each adapted module that is quantized.
        found: where each adapted module lies in the graph.
    """

    network: nn.Module
    tokenizer: Any
    grids: dict[str, Grid]
    found: dict[str, Match]


def grid_network(
    graph: ir.Model,
    folder: Path,
    adapter: Adapter,
    found: dict[str, Match],
    reference: str | Path,
    device: str | None = "cpu",
) -> GridNetwork:
    """Load the reference and give it the weights of the graph.

    Args:
        graph: of folder/model.onnx, an int4 base without adapter.
        folder: where its data is.
        adapter: its blocks become the branch, its saved head replaces the model's.
        found: where its modules lie in the graph.
        reference: Hugging Face folder or id of the float model.
        device: where the network goes; None: a GPU with room for it, else the processor.

    Raises:
        CheckpointError: the reference cannot be loaded.
        AdapterError: the adapter was not trained on it. ExportError: a module in nodes of different grids.
    """
    adapter.check_base(Checkpoint.open(reference))
    network, tokenizer = load_base(reference, adapter.task, labels=adapter.labels or None)
    attach(network, replace(adapter, modules={}))  # its head
    grids, bare = lay(network, "", graph, folder, adapter, found)
    if bare:
        log.debug("layers that the graph does not show as linear ones: %s", ", ".join(bare))
    return GridNetwork(network.to(device or place(network)), tokenizer, grids, found)


def lay(
    part: nn.Module, path: str, graph: ir.Model, folder: Path, adapter: Adapter, found: dict[str, Match]
) -> tuple[dict[str, Grid], list[str]]:
    """Give the linear layers of a part of a network the weights of the graph; those with blocks become `GridLinear`.

    Args:
        part: of the network, or all of it.
        path: its module path; "" is the network.
        graph, folder, adapter, found: as `grid_network`'s.

    Returns:
        The base's grid of each layer with blocks that is quantized; layers that the graph does not show, whose values
        stay float.
    """
    grids: dict[str, Grid] = {}
    bare: list[str] = []
    lay_experts(Places(folder / MODEL), part, path)
    for name, module in list(part.named_modules(prefix=path)):
        if not is_linear(module):
            continue
        one = found.get(name) or matched(graph, name, module)
        if one is None:
            bare.append(name)
            continue
        grid = read(one, folder) if quantized(one) else None
        if name in adapter.modules:
            blocks = adapter.modules[name]
            inside = name.removeprefix(path).removeprefix(".")
            replace_module(part, inside, GridLinear(module, blocks.shape, blocks.blocks, grid))
            grids |= {} if grid is None else {name: grid}
        elif grid is not None:
            _set_weight(module, grid)
    return grids, bare


def matched(graph: ir.Model, name: str, module: nn.Module) -> Match | None:
    """Where a linear layer lies, as a module of one block of zeros; None where the graph does not show it."""
    inputs, outputs = features(module)
    weight = _oriented(module)
    nothing: Array = np.zeros((1, 1, 1), np.float32)
    one = AdaptedModule(name, np.broadcast_to(nothing, (1, inputs, outputs)), inputs, outputs, fingerprint(weight))
    try:
        return match(graph, {name: one})[name]
    except MatchError:
        return None


def _oriented(module: nn.Module) -> Array:
    """A linear layer's weight, (out, in)."""
    weight: Array = module.get_parameter("weight").detach().numpy()
    inputs, outputs = features(module)
    return weight if isinstance(module, nn.Linear) else weight.reshape(inputs, outputs).T


@torch.no_grad()
def _set_weight(module: nn.Module, grid: Grid) -> None:
    """Give a layer a weight of its own: a tied one belongs to the embedding too, which the graph may hold in float."""
    old = module.get_parameter("weight")
    values = grid.weight(features(module)[0])
    oriented = values if isinstance(module, nn.Linear) else values.T
    module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(oriented)).to(old.dtype), requires_grad=False)


def target(module: AdaptedModule, grid: Grid) -> Float32:
    """What a module's merged weight should be: the grid's values and the blocks, (out, groups, size)."""
    merged = add_to_weight(grid.weight(module.in_features), module.blocks)
    return grouped(np.asarray(merged, np.float32), grid.codes.shape[-1])
