"""Where an export of this program goes wrong: its modules are watched, and put beside those of torch by `twins`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from diablo_export.adapter import Adapter
from diablo_export.algorithms import LEARNED
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint
from diablo_export.fingerprint import sample
from diablo_export.measure import exported, sources
from diablo_export.measure.exported_base import rebuild
from diablo_export.measure.foreign_places import Wanted, find
from diablo_export.measure.given_base import given_base
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.places import Graph, Place
from diablo_export.measure.prompts import Sample
from diablo_export.measure.stored import Fitted
from diablo_export.measure.taps import OnnxTaps, TorchTaps, open_session
from diablo_export.measure.twins import Findings, compare
from diablo_export.trainer.layer import DiabloLinear, is_linear, takes_blocks
from diablo_export.trainer.model import load_base
from diablo_export.trainer.packed_layer import oriented

# Decibels that the worst row of an input must reach. Float32 norms and attention are measured at 95 and more; a rotary
# table that is off by one position gives 5 to 40. Float16 rounds by 66 dB, and a residual stream is some hundred sums.
_INPUT = {"fp16": 30.0, "fp32": 60.0}
# The same of the worst column of an output, against the mean column. Float32 sums are measured at 100 and more; one
# block of 16 × 16 with its signs turned gives 10 to 30. bfloat16 rounds weights by 54 dB, and float16 by 66.
_OUTPUT = {"fp32": 60.0, "fp16": 35.0, "bf16": 30.0}
# Blocks in int8 are off by up to 2 % of an effect that is rarely larger than the output itself: 34 dB
_BLOCKS = {"int8": 25.0, "fp16": 50.0}


def look(
    out: Path,
    manifest: Mapping[str, Any],
    model: nn.Module,
    name: str,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    rebuilt: Mapping[str, Array] | None = None,
    threads: int | None = None,
    lost: bool = False,
) -> Findings:
    """Compare an export with the tuned model module by module.

    Args:
        out: the output folder.
        manifest: its manifest.
        model: the tuned model in torch.
        name: of the adapter in the manifest.
        adapter: the adapter.
        samples: what was compared; of the longest of them up to TOKENS tokens are run.
        rebuilt: of a merge, the base's weights in its layout, where they have been made already.
        threads: of onnxruntime.
        lost: the adapter's effect on the logits is not what it should be: look for it in the weights, too.

    Raises:
        ExportError: onnxruntime refuses the graph.
    """
    linear = linear_layers(model)
    with_adapter, without = _export(out, manifest, model, name, adapter, linear, rebuilt, threads)
    if isinstance(with_adapter, OnnxTaps) and not with_adapter.places:
        return Findings([], None)  # all of them inside other operators
    watched = list(with_adapter.places if isinstance(with_adapter, OnnxTaps) else linear)
    merged = {} if sources.is_branch(manifest) else sources.merged_part(manifest, adapter).modules
    return compare(
        linear,
        with_adapter,
        without,
        TorchTaps(model, True, watched),
        TorchTaps(model, False, watched),
        samples,
        decodes=_decodes(with_adapter, adapter),
        limits=_limits(out, manifest),
        merged=merged.get,
        fitted=_is_fitted(manifest),
        digests={entry["name"]: entry.get("values_xxh3") for entry in manifest["modules"]},
        judged=not any(".onnx" in file for file in (manifest.get("base") or {}).get("files") or {}),
        lost=lost,
    )


def _export(
    out: Path,
    manifest: Mapping[str, Any],
    model: nn.Module,
    name: str,
    adapter: Adapter,
    linear: Mapping[str, nn.Module],
    rebuilt: Mapping[str, Array] | None,
    threads: int | None,
) -> tuple[OnnxTaps | TorchTaps, OnnxTaps | TorchTaps]:
    """The export with its adapter on and off, watched."""
    if not sources.is_onnx(out):
        other, _ = load_base(out, adapter.task)
        return TorchTaps(other, True, list(linear)), TorchTaps(model, False, list(linear))
    graph, shape, entries = Graph(out / "model.onnx"), cache_shape(out), list(manifest["modules"])
    biased = {module: getattr(layer, "bias", None) is not None for module, layer in linear.items()}
    places = graph.places(entries, biased)
    unmarked = linear if manifest.get("exporter") == "given" and manifest.get("quantize") != "none" else {}
    places |= _unadapted(graph, unmarked, places)
    if sources.is_branch(manifest):
        session = open_session(graph, places, threads)
        on, off, _ = exported.states(manifest, session, out, name, shape)
        return OnnxTaps(graph, on, places), OnnxTaps(graph, off, places)
    given = given_base(manifest, adapter)
    if given is not None:
        before = Graph(given)  # it has no branches, so its values may have other names
        there = before.places(entries, biased)
        there |= _unadapted(before, unmarked, there)
        pairs = ((graph, places), (before, there))
        on, off = (OnnxRunner(open_session(*pair, threads), cache_shape=shape) for pair in pairs)
        return OnnxTaps(graph, on, places), OnnxTaps(before, off, there)
    if rebuilt is None:
        rebuilt = rebuild(graph.path, entries, Checkpoint.open(str(model.name_or_path)), adapter).initializers
    sessions = (open_session(graph, places, threads, values) for values in (None, rebuilt))
    on, off = (OnnxRunner(session, cache_shape=shape) for session in sessions)
    return OnnxTaps(graph, on, places), OnnxTaps(graph, off, places)


def _unadapted(graph: Graph, linear: Mapping[str, nn.Module], places: Mapping[str, Place]) -> dict[str, Place]:
    """The layers without blocks of a model that somebody else quantized, found by their values.

    No node is marked there, and torch's float ones in their place would be blamed on the layer behind them.
    """
    left = {name: layer for name, layer in linear.items() if name not in places and is_linear(layer)}
    wanted = {}
    for name, layer in left.items():
        weight = oriented(layer)
        wanted[name] = Wanted(len(weight), weight.shape[1], (sample(weight),))
    found, _ = find(graph, wanted)
    entries = [{"name": name, "node": one.node.name, "rows": one.rows} for name, one in found.items()]
    biased = {name: getattr(layer, "bias", None) is not None for name, layer in left.items()}
    return graph.places(entries, biased)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by path; an adapted one, here or by PEFT, as the layer under its adapter."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        base: Any = module
        if isinstance(module, DiabloLinear):
            base = module.base
        elif hasattr(module, "get_base_layer") and hasattr(module, "disable_adapters"):
            base = module.get_base_layer()
        if takes_blocks(base) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = base
    return found


def _is_fitted(manifest: Mapping[str, Any]) -> Fitted:
    """Which codes were chosen for the least error of outputs, which takes them steps away from the weights."""
    method = (manifest.get("survival") or {}).get("method")
    return "all" if method in ("gptq", LEARNED) else method in ("calibrated", "distilled")


def _decodes(taps: OnnxTaps | TorchTaps, adapter: Adapter) -> bool:
    return taps.runner.decodes if isinstance(taps, OnnxTaps) else adapter.task_type == "CAUSAL_LM"


def _limits(out: Path, manifest: Mapping[str, Any]) -> tuple[float, float]:
    """What the worst row of an input and the worst column of a float module's output must reach."""
    half = sources.is_onnx(out) and "fp16" in (
        manifest.get("precision"),
        (manifest.get("options") or {}).get("precision"),
    )
    return decibels_of(sources.precision(out, manifest), half, sources.block_dtype(manifest))


def decibels_of(precision: str, half: bool, block_dtype: str | None = None) -> tuple[float, float]:
    """What the worst row of an input and the worst column of a float module's output must reach.

    Args:
        precision: what weights were written in.
        half: whether the graph computes in 16 bits.
        block_dtype: of a branch's blocks, where they are stored in another type than the graph's.
    """
    output = min(_OUTPUT["fp16" if half else "fp32"], _OUTPUT.get(precision, math.inf))
    blocks = _BLOCKS.get(block_dtype or "", math.inf)
    return _INPUT["fp16" if half else "fp32"], min(output, blocks)
