"""Module by module, an export of another program: which value of its graph is a module is found out, then compared.

`foreign_places` finds each module's node by its weight's values and lists the values that may be the module's output;
of these the one is taken that is nearest to what torch makes of the very same input. Modules that no node has the
values of, or whose output is no value of the graph, are listed with the reason, and not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from torch import nn

from diablo_export import runtime
from diablo_export.blockdiag import Array
from diablo_export.fingerprint import SAMPLES, positions
from diablo_export.measure import foreign_graph, foreign_places
from diablo_export.measure.coded import coded
from diablo_export.measure.foreign_places import End, Found, Wanted
from diablo_export.measure.modules import decibels_of, linear_layers
from diablo_export.measure.onnx_runner import OnnxRunner
from diablo_export.measure.places import Graph, Part, Place
from diablo_export.measure.prompts import Ids, Sample
from diablo_export.measure.stored import audit
from diablo_export.measure.taps import OnnxTaps, TorchTaps
from diablo_export.measure.torch_runner import TorchRunner
from diablo_export.measure.twins import Findings, compare
from diablo_export.trainer.layer import features

_LOOKED_AT = 16  # tokens that tell which value is a module's output
_IN_WEIGHTS = 0.5  # of an adapter, and more: it was merged
_ROWS = 512  # of an identity that a layer is shown at once
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class _Watched:
    """A graph with its modules found.

    Attributes:
        taps: the graph, running.
        merged: quantized modules in whose weight the adapter should be.
        rounded: modules whose adapter is quantized itself.
        reasons: of the modules that were not found, why.
    """

    taps: OnnxTaps
    merged: set[str]
    rounded: set[str]
    reasons: dict[str, str]


def look(
    file: foreign_graph.Graph,
    on: OnnxRunner,
    off: OnnxRunner | TorchRunner,
    other: foreign_graph.Graph | None,
    tuned: TorchRunner,
    base: TorchRunner,
    samples: Sequence[Sample],
    *,
    threads: int | None,
    lost: bool,
) -> tuple[Findings, dict[str, str]]:
    """Compare another program's export with the tuned model, as far as its modules can be found.

    Args:
        file: the export.
        on: how it is run with its adapter; sessions of these two are not used.
        off: how it, or `other`, is run without; the base in torch where nothing else is at hand.
        other: the same program's export of the base, where `off` runs that.
        tuned: the reference.
        base: its base.
        samples: what was compared.
        threads: of onnxruntime.
        lost: as of `twins.compare`.

    Returns:
        The findings, and the modules that were not looked at with the reason; those are all where nothing was found.

    Raises:
        ExportError: onnxruntime refuses the graph.
    """
    model, graph = tuned.model, Graph(file.file)
    linear = {name: layer for name, layer in linear_layers(model).items() if ".original_module" not in name}
    piece = max((sample.ids for sample in samples), key=len)[:_LOOKED_AT]
    there = _watch(graph, on, tuned, base, linear, piece, threads)
    watched = list(there.taps.places)
    if not watched:
        return Findings(), there.reasons
    taps = [TorchTaps(model, runner.adapted, watched, runner.switch) for runner in (tuned, base)]
    without: OnnxTaps | TorchTaps = taps[1]
    if isinstance(off, OnnxRunner):
        same = replace(there.taps, runner=replace(there.taps.runner, adapter=off.adapter, fixed=off.fixed))
        without = same if other is None else _watch(Graph(other.file), off, base, base, linear, piece, threads).taps
    half = any(stored.data_type in _HALF for stored in graph.stored.values())
    found = compare(
        linear,
        there.taps,
        without,
        taps[0],
        taps[1],
        samples,
        decodes=there.taps.runner.has_cache and file.length is None,
        limits=decibels_of(file.precision, half),
        merged=lambda name: _delta(name, tuned, base, linear[name]) if name in there.merged else None,
        rounded=there.rounded,
        judged=False,
        lost=lost,
    )
    return found, there.reasons


def _watch(
    file: Graph,
    runner: OnnxRunner,
    tuned: TorchRunner,
    base: TorchRunner,
    linear: Mapping[str, nn.Module],
    piece: Ids,
    threads: int | None,
) -> _Watched:
    """Find the modules in a graph, run it on a few tokens, and settle on the value that is each module's output."""
    sizes = {name: features(layer) for name, layer in linear.items()}
    wanted = {
        name: Wanted(outputs, inputs, _samples(name, linear[name], tuned, base))
        for name, (inputs, outputs) in sizes.items()
    }
    found, reasons = foreign_places.find(file, wanted)
    for name, place in list(found.items()):
        inside = file.hidden_bias(place.node) if getattr(linear[name], "bias", None) is not None else None
        if inside is not None:
            reasons[name] = f"its bias is added inside {inside}, so that its output is no value of the graph"
            del found[name]
    listed = {name: foreign_places.ends(file, place) for name, place in found.items()}
    values = {end.y for each in listed.values() for end in each} | {place.node.input[0] for place in found.values()}
    outputs = values | ({file.rounded_table} if file.rounded_table else set())
    session = runtime.session(file.path, model=file.tapped(outputs), threads=threads, spin=False)
    taps = OnnxTaps(file, replace(runner, session=session), {})
    seen = next(taps.values([piece], sorted(values)))
    places, merged, rounded = {}, set[str](), set[str]()
    for name, place in found.items():
        end = _nearest(file, place, listed[name], seen, name, tuned, base, linear)
        if end is None:
            reasons[name] = "no value behind its node has its size"
            continue
        part = Part(place.node, place.rows, end.y, end.start, end.stop)
        places[name] = Place(name, place.node.input[0], (part,))
        if end.products == "none" and coded(file, place.node) is not None:
            merged.add(name)
        if end.products == "coded":
            rounded.add(name)
    return _Watched(replace(taps, places=places), merged, rounded, reasons)


def _nearest(
    file: Graph,
    place: Found,
    listed: Sequence[End],
    seen: Mapping[str, Array],
    name: str,
    tuned: TorchRunner,
    base: TorchRunner,
    linear: Mapping[str, nn.Module],
) -> End | None:
    """The value that is nearest to what torch makes of the module's input, but for what rounded weights explain."""
    x = seen[place.node.input[0]]
    wanted = _shown(name, tuned, x) + _explained(file, place, x, name, tuned, base, linear[name])
    fitting = [(end, seen[end.y][:, end.start : end.stop]) for end in listed]
    far = [(float(((y - wanted) ** 2).sum()), end) for end, y in fitting if y.shape == wanted.shape]
    return min(far, key=lambda one: one[0])[1] if far else None


def _explained(
    file: Graph, place: Found, x: Array, name: str, tuned: TorchRunner, base: TorchRunner, layer: nn.Module
) -> Array | float:
    """What rounding does to the outputs, whether the adapter is in the weights, which they themselves tell, or not."""
    if coded(file, place.node) is None:
        return 0.0
    part = Place(name, "", (Part(place.node, place.rows, "", *place.rows),))
    delta = _delta(name, tuned, base, layer)
    looked = audit(file, part, layer, delta, x, fitted=False, hashed=False)
    if looked is not None and looked[0].gain < _IN_WEIGHTS:
        looked = audit(file, part, layer, None, x, fitted=False, hashed=False)
    return looked[1].error if looked is not None else 0.0


@torch.inference_mode()
def _shown(name: str, runner: TorchRunner, x: Array) -> Array:
    """What a module of torch gives for rows of inputs; no hook on it is called, and its adapter stays as it is set."""
    module = runner.model.get_submodule(name)
    runner.switch(module, runner.adapted)
    dtype = next(module.parameters()).dtype
    given: Array = module.forward(torch.from_numpy(np.ascontiguousarray(x)).to(dtype)[None])[0].float().numpy()
    return given


def _samples(name: str, layer: nn.Module, tuned: TorchRunner, base: TorchRunner) -> tuple[Array, ...]:
    """The 64 samples of a module's weight without and with the adapter, whatever kind of adapter it is: read off it."""
    inputs, outputs = features(layer)
    rows, columns = positions(outputs, inputs)
    shown = np.zeros((SAMPLES + 1, inputs), np.float32)  # and a row of zeros: the bias
    shown[np.arange(SAMPLES), columns] = 1
    found = []
    for runner in (base, tuned):
        given = _shown(name, runner, shown)
        found.append((given[:-1] - given[-1])[np.arange(SAMPLES), rows])
    return tuple(found)


def _delta(name: str, tuned: TorchRunner, base: TorchRunner, layer: nn.Module) -> Array | None:
    """What the adapter adds to a module's weight, (out_features, in_features); None where that is nothing."""
    inputs, outputs = features(layer)
    delta = np.empty((outputs, inputs), np.float32)
    for start in range(0, inputs, _ROWS):
        shown = np.zeros((min(_ROWS, inputs - start) + 1, inputs), np.float32)
        shown[np.arange(len(shown) - 1), np.arange(start, start + len(shown) - 1)] = 1
        off, on = _shown(name, base, shown), _shown(name, tuned, shown)  # so that it is on again
        delta[:, start : start + len(shown) - 1] = ((on[:-1] - on[-1]) - (off[:-1] - off[-1])).T
    return delta if delta.any() else None
