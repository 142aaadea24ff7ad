"""A Hugging Face model to an ONNX graph: chooses the road, says why, and hands the weights to the stream.

The onnxruntime-genai road gives the fastest graphs that ONNX Runtime has; the torch road takes everything else. A graph
that the runtime then refuses never leaves this module: a session is opened and runs a few tokens.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diablo_export.adapter import TASKS, Adapter, file_sha256
from diablo_export.algorithms import Algorithm
from diablo_export.base_grid import BITS
from diablo_export.checkpoint import HEAD, Checkpoint
from diablo_export.console import log
from diablo_export.converters.hf_folder import padding
from diablo_export.converters.onnx_file import MODEL
from diablo_export.converters.onnx_nodes import Weights, finish
from diablo_export.converters.onnx_trial import try_graph
from diablo_export.converters.onnx_weights import DATA
from diablo_export.converters.packed_view import float_view
from diablo_export.converters.stacked_view import stacked_view
from diablo_export.errors import DependencyError, ExportError, InputError, require, require_all
from diablo_export.packed.modules import refuse_unreadable
from diablo_export.quantization import check_layout

PRECISIONS = ("fp32", "fp16")
ACCURACY_LEVELS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Graph:
    """What was built.

    `modules` gives per Hugging Face module how its weight lies: node, layout, weight, transposed, rows, and scales,
    zero_points, bits, group_size, symmetric where quantized. A module that the builder split into several nodes
    has `{"parts": [one such entry per node]}`, each with its `rows` of the module's outputs.
    """

    exporter: str  # genai or torch
    reason: str
    modules: dict[str, dict[str, Any]]
    hashes: dict[str, str]  # file name → SHA-256


def load_exporters() -> None:
    """Import what builds graphs: to be called before an output folder is begun.

    A Ctrl-C inside these C++ libraries' own start-up ends the process on the spot, with no clean-up.

    Raises:
        DependencyError: one of them is missing.
    """
    require_all("train", "torch", "transformers")
    require("onnxruntime", "cpu")
    with contextlib.suppress(DependencyError):  # the road that needs it says so
        require("onnxruntime_genai.models.builder", "genai")


def build_graph(
    model: str | Path,
    folder: Path,
    *,
    task: str = "causal-lm",
    quantize: str = "none",
    group_size: int = 32,
    symmetric: bool = True,
    precision: str = "fp32",
    accuracy_level: int = 4,
    merged: Adapter | None = None,
    head: Adapter | None = None,
    wide: Collection[str] = (),
    algorithm: Algorithm | None = None,
) -> Graph:
    """Write model.onnx, model.onnx.data, config and tokenizer files into `folder`.

    Args:
        model: Hugging Face folder or id; of a quantized one the codes are kept, where MatMulNBits has them.
        folder: an existing folder to fill.
        task: causal-lm or text-classification.
        quantize: none, int8, int4 or int2 for every linear layer; embeddings and vectors stay float.
        group_size: input positions that share a scale, when quantizing.
        symmetric: no zero points.
        precision: fp32 or fp16, of everything that is not quantized.
        accuracy_level: MatMulNBits' own: 4 multiplies in int8 (fastest for decoding on CPU, and what
            onnxruntime-genai builds), 1 in float32 (exact, faster for long prompts).
        merged: its blocks are added to the weights on their way, and its saved head replaces the model's.
        head: only its saved head replaces the model's.
        wide: modules that are quantized to 8 bits, when quantizing.
        algorithm: how weights are quantized; None: each to the nearest.

    Raises:
        InputError: an option's value. CheckpointError: the model cannot be read.
        ExportError: no road can take this model; says why of each.
        MatchError: `merged` has modules that the graph does not show; lists them.
    """
    _check_options(task, quantize, group_size, precision, accuracy_level)
    from diablo_export.converters import genai_graph, torch_graph

    checkpoint = Checkpoint.open(model)
    if quantize != "none" or merged is not None:
        check_float(checkpoint)
    checkpoint = stacked_view(float_view(checkpoint))
    saved = {**(head.saved if head else {}), **(merged.saved if merged else {})}
    weights = Weights(checkpoint, merged, saved)
    # a head of its own, or a quantized one, cannot share the embedding's table
    own = (merged and "lm_head" in merged.modules) or HEAD in saved or checkpoint.has_own_head()
    share = quantize == "none" and not own
    how: dict[str, Any] = {"quantize": quantize, "group_size": group_size, "symmetric": symmetric}
    how |= {"accuracy_level": accuracy_level, "wide": wide, "algorithm": algorithm}

    def take(road: Any, **more: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        layout = road.layout(weights, folder, precision=precision, share_embeddings=share, **more)
        modules, digest = finish(layout, replace(weights, tied=layout.tied), folder, **how)
        try_graph(folder / MODEL)
        _write_config(checkpoint, folder, merged or head)
        return modules, {DATA: digest, MODEL: file_sha256(folder / MODEL)}

    before = set(folder.iterdir())
    refusal = genai_graph.refusal(checkpoint.config, task)
    if refusal is None:
        try:
            modules, hashes = take(genai_graph)
            return Graph("genai", genai_graph.reason(checkpoint.config, precision), modules, hashes)
        except ExportError as error:
            refusal = str(error)
            remove(set(folder.iterdir()) - before)
    log.info("exporting with torch: %s", refusal)
    try:
        modules, hashes = take(torch_graph, task=task)
    except ExportError as error:
        raise ExportError(
            f"{model}: no road to ONNX can take this model.\n  onnxruntime-genai: {refusal}\n  torch: {error}"
        ) from error
    return Graph("torch", refusal, modules, hashes)


def _check_options(task: str, quantize: str, group_size: int, precision: str, accuracy_level: int) -> None:
    allowed = {
        "task": (task, tuple(TASKS)),
        "quantize": (quantize, tuple(BITS)),
        "precision": (precision, PRECISIONS),
        "accuracy_level": (accuracy_level, ACCURACY_LEVELS),
    }
    faults = [
        f"{name} is {value!r}, but must be one of {', '.join(map(str, choices))}"
        for name, (value, choices) in allowed.items()
        if value not in choices
    ]
    if faults:
        raise InputError("; ".join(faults))
    if quantize != "none":
        check_layout(BITS[quantize], group_size)


def check_float(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are quantized.

    Raises:
        ExportError: it is; names the format.
    """
    refuse_unreadable(checkpoint)
    if quantization := checkpoint.config.get("quantization_config"):
        raise ExportError(
            f"{checkpoint.folder}: its weights are quantized already ({quantization['quant_method']}): export keeps "
            "their codes without --quantize, merge without --quantize and --format writes them back; else give the "
            "float model, or an ONNX model whose weights are int4"
        )


def _write_config(checkpoint: Checkpoint, folder: Path, adapter: Adapter | None) -> None:
    """config.json and generation_config.json; a classifier's classes are the adapter's."""
    config = dict(checkpoint.config)
    if adapter is not None and adapter.classifies:
        config |= padding(checkpoint, adapter.saved)  # as the graph has it
    if adapter is not None and adapter.labels:
        config["id2label"] = {str(index): label for index, label in enumerate(adapter.labels)}
        config["label2id"] = {label: index for index, label in enumerate(adapter.labels)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = checkpoint.folder / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, folder / generation.name)


def remove(paths: Iterable[Path]) -> None:
    """Remove what one road wrote, files and folders, before another begins."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
