"""What blocks begin at, where that is not zero: another adapter's blocks, the float weights behind a grid, a repair."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from diablo_export.adapter import AdaptedModule, Adapter, base_weight, refuse_base
from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import under_blocks
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import AdapterError
from diablo_export.quantization import Float32, dequantize
from diablo_export.trainer.layer import DiabloLinear, diablo_layers
from diablo_export.trainer.learner import Learner
from diablo_export.trainer.packed_base import is_packed
from diablo_export.trainer.prepare import Lesson
from diablo_export.trainer.repair import begin_repaired


def begin(
    learner: Learner,
    lesson: Lesson,
    checkpoint: Checkpoint,
    *,
    given: Adapter | None,
    grid: BaseGrid | None,
    repair: bool,
    batch_size: int,
) -> None:
    """Give a learner what a run begins at.

    Args:
        learner: its blocks are zero.
        lesson: what it is to learn; also the text that a base is repaired on.
        checkpoint: of the base.
        given: the adapter to begin at.
        grid: that the base lies on.
        repair: begin at the best repair of the base, see `repair`.
        batch_size: items at once, there.

    Raises:
        AdapterError: the given adapter has other blocks, or a head for other classes.
    """
    on_grid = grid is not None and grid.on_grid
    if given is not None:
        begin_at(learner.network, learner.parameters, given, checkpoint, given.base_grid if on_grid else grid)
        _check_classes(given, lesson.labels)
    if repair:
        begin_repaired(learner.network, checkpoint, lesson.items, batch_size, lesson.pad)
    elif on_grid:
        begin_at_float(learner.network, checkpoint)


@torch.no_grad()
def begin_at(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    adapter: Adapter,
    checkpoint: Checkpoint,
    grid: BaseGrid | None,
) -> None:
    """Give a network's blocks and head the values of an adapter for the same base.

    On another grid than the adapter's, a block also takes what the base's weights under it have moved by: base + blocks
    there begin as the weights that the adapter was trained to be.

    Args:
        network: holds DiaBlo layers.
        parameters: the head's, by name.
        adapter: has blocks of the same shape for each of these layers, and the same head.
        checkpoint: of the base.
        grid: that the network's base lies on.

    Raises:
        AdapterError: lists the modules that it lacks, has in another shape, or has whole where none is trained.
    """
    layers = diablo_layers(network)
    faults = [fault for name, layer in layers.items() if (fault := _fault(name, layer, adapter.modules.get(name)))]
    faults += [f"{name}: has blocks, and is not among the target modules" for name in adapter.modules.keys() - layers]
    faults += [
        f"{name}: the head in training is {list(parameters[name].shape)}, the adapter's {list(value.shape)}"
        for name, value in adapter.saved.items()
        if name in parameters and tuple(parameters[name].shape) != value.shape
    ]
    faults += [
        f"{name}: the adapter has it whole, and this run trains it not: it would be the base's again"
        for name in adapter.saved.keys() - parameters
    ]
    refuse_base(adapter, "in training", faults)
    was = adapter.base_grid
    # beside a quantized checkpoint they stay what they are: the float weights that lay on a grid are not there
    moved = (grid and grid.numbers) != (was and was.numbers) and not is_packed(checkpoint)
    for name, layer in layers.items():
        blocks = adapter.modules[name].blocks.astype(np.float32)
        if moved:
            weight = base_weight(checkpoint, name)
            blocks = blocks + under_blocks(_laid(weight, was) - _laid(weight, grid), layer.shape)
        layer.blocks.copy_(torch.from_numpy(blocks))
    for name, value in adapter.saved.items():
        parameters[name].copy_(torch.from_numpy(value.astype(np.float32)))


@torch.no_grad()
def begin_at_float(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Add to the blocks what the weights under them lost to their grid.

    Blocks that are to be rounded to whole steps then begin spread over their steps, each at its own code still: a move
    of a tenth of a step changes a tenth of the codes, and small moves are not lost.
    """
    for name, layer in diablo_layers(network).items():
        lost = base_weight(checkpoint, name) - layer.weight.cpu().numpy()
        layer.blocks.add_(torch.from_numpy(under_blocks(lost, layer.shape)).to(layer.blocks.device))


def _check_classes(adapter: Adapter, classes: list[str] | None) -> None:
    """A head's rows are its classes': begun at for others they would be mixed up, and nothing would say so."""
    named = any(name != f"LABEL_{index}" for index, name in enumerate(adapter.labels))  # else nobody named them
    if adapter.saved and named and classes is not None and adapter.labels != classes:
        raise AdapterError(
            f"{adapter.path}: its head is for the classes {', '.join(adapter.labels)}, the data's are "
            f"{', '.join(classes)}; give data of these classes, with id2label in the base's config.json where only the "
            "order differs, or leave out --init-adapter"
        )


def _laid(weight: Float32, grid: BaseGrid | None) -> Float32:
    return weight if grid is None else dequantize(grid.quantize(weight))


def _fault(name: str, layer: DiabloLinear, module: AdaptedModule | None) -> str | None:
    if module is None:
        return f"{name}: is to be trained, but the adapter has no blocks for it"
    if module.blocks.shape != layer.shape.blocks:
        return f"{name}: blocks of {layer.shape.blocks} are to be trained, the adapter's are {module.blocks.shape}"
    return None
