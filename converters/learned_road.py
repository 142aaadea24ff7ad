"""Learned rounding of a quantized ONNX model: every code and scale in the file trained, from those that it has.

First decoder layer after decoder layer, each on what it gives with float weights, reading what the layers before it
give with theirs rounded; then, where memory allows it, all of them together on the answers of the whole model. What is
trained is what is written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from diablo_export.console import log, progress
from diablo_export.converters import budget
from diablo_export.converters.grid_network import matched
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_groups import quantized, read, scale_type, write
from diablo_export.converters.onnx_match import Match
from diablo_export.converters.sizes import COPIES
from diablo_export.errors import ExportError
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.layer import diablo_layers, is_linear
from diablo_export.trainer.layerwise import Layers, layers_path
from diablo_export.trainer.model import replace_module
from diablo_export.trainer.rounding import learn, round_linear

LAYER_STEPS, STEPS, _LEAST_STEPS = 150, 250, 40  # of Adam: for each layer, and for all together
_TOKENS = 1024  # in a step
_PASSES = 4  # of a step: float and rounded forward, and a backward pass that is worth two
_LR = 0.02  # code units
_HIDDEN = 1 << 26  # numbers of hidden states for each of the two that are compared: 256 MB
TRAINED_COPIES = 7.0  # of the weights in float32 while all are trained: tuned, float, latents, gradient, two of Adam's


def learned_road(
    folder: Path,
    tuned: nn.Module,
    items: Sequence[Encoded],
    *,
    whole: bool,
    seconds: float,
    pad: int = 0,
    seed: int = 0,
) -> dict[str, int]:
    """Train the codes and scales of folder/model.onnx, in place.

    Args:
        folder: its model is `tuned`, quantized.
        tuned: the float tuned model, its blocks beside its weights; stays as it is.
        items: token sequences to train on.
        whole: train all layers together, too.
        seconds: about what it may take; steps are cut to it, to 40 at the least.
        pad: the id that fills short sequences up.
        seed: of the order of the text.

    Returns:
        How many steps each layer was trained, `layer_steps`, and all together, `steps`.

    Raises:
        ExportError: the model has no layers that can be run alone, and is not to be trained as a whole.
    """
    graph, network = ir.load(folder / MODEL), _merged(tuned)
    found = _found(network, graph)
    layers = round_linear(network, {name: read(one, folder) for name, one in found.items()})
    network.to(budget.place(network, TRAINED_COPIES if whole else COPIES))
    size = max(1, min(_TOKENS, budget.batch_tokens(network)) // max(len(item.ids) for item in items))
    took = budget.seconds_per_token(network, items[:size], pad) * sum(len(item.ids) for item in items[:size])
    affordable = seconds / (took * _PASSES * (2 if whole else 1))
    each, together = (int(max(_LEAST_STEPS, min(most, affordable))) for most in (LAYER_STEPS, STEPS))
    done = {"layer_steps": each}
    try:
        _layer_by_layer(network, list(found), items, steps=each, size=size, pad=pad, seed=seed)
    except ExportError as error:
        if not whole:
            raise
        log.info("learned as a whole alone: %s", error)
        done = {}
    if whole:
        done["steps"] = together
        with progress("Rounding", together) as advance:
            learn(network, items, steps=together, batch_size=size, lr=_LR, pad=pad, seed=seed, advance=advance)
    for name, one in found.items():
        write(one, layers[name].finish().stored_as(scale_type(one)), folder)
    ir.save(graph, folder / MODEL)
    return done


def _merged(tuned: nn.Module) -> nn.Module:
    """A copy of the tuned model with its blocks in its weights."""
    network = copy.deepcopy(tuned)
    for name, layer in diablo_layers(network).items():
        layer.merge()
        replace_module(network, name, layer.base)
    return network.requires_grad_(False)


def _found(network: nn.Module, graph: ir.Model) -> dict[str, Match]:
    """Where the network's linear layers lie in the graph, those that it holds quantized."""
    linear = {name: module for name, module in network.named_modules() if is_linear(module)}
    found = {name: one for name, module in linear.items() if (one := matched(graph, name, module)) is not None}
    return {name: one for name, one in found.items() if quantized(one)}


def _layer_by_layer(
    network: Any, names: Sequence[str], items: Sequence[Encoded], *, steps: int, size: int, pad: int, seed: int
) -> None:
    """Train one decoder layer after the other; what lies outside of them stays."""
    layers = Layers(network, layers_path(network, names))
    longest, width = max(len(item.ids) for item in items), int(network.get_input_embeddings().embedding_dim)
    kept = max(size, _HIDDEN // (longest * width))
    ordered = sorted(items[:kept], key=lambda item: len(item.ids))
    batches = [layers.listen(ordered[at : at + size], pad, ("branch", "grid")) for at in range(0, len(ordered), size)]
    try:
        with progress("Layers", len(layers.layers)) as advance:
            for index, layer in enumerate(layers.layers):
                losses = layers.distil(index, layer, batches, steps=steps, lr=_LR, hard=0.0, seed=seed)
                log.debug("layer %d: share of its outputs that is missed, step by step: %s", index, losses)
                advance(1)
    finally:
        layers.put_back()
