"""A Hugging Face model to an ONNX graph: chooses the road, says why, and hands the weights to the stream.

The onnxruntime-genai road gives the fastest graphs that ONNX Runtime has; the torch road takes everything else. A graph
that the runtime then refuses never leaves this module: a session is opened and runs one token.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diablo_export.adapter import Adapter, file_sha256
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.onnx_nodes import MODEL, Weights, finish
from diablo_export.converters.onnx_weights import DATA
from diablo_export.errors import ExportError

QUANTIZE = ("none", "int8", "int4")
PRECISIONS = ("fp32", "fp16")


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
) -> Graph:
    """Write model.onnx, model.onnx.data, config and tokenizer files into `folder`.

    Args:
        model: Hugging Face folder or id.
        folder: an existing folder to fill.
        task: causal-lm or text-classification.
        quantize: none, int8 or int4 for every linear layer; embeddings and vectors stay float.
        group_size: input positions that share a scale, when quantizing.
        symmetric: no zero points.
        precision: fp32 or fp16, of everything that is not quantized.
        accuracy_level: MatMulNBits' own: 4 multiplies in int8 (fastest for decoding on CPU, and what
            onnxruntime-genai builds), 1 in float32 (exact, faster for long prompts).
        merged: its blocks are added to the weights on their way, and its saved head replaces the model's.
        head: only its saved head replaces the model's.

    Raises:
        ExportError: no road can take this model, and why.
    """
    from diablo_export.converters import genai_graph, torch_graph

    checkpoint = Checkpoint.open(model)
    saved = {**(head.saved if head else {}), **(merged.saved if merged else {})}
    weights = Weights(checkpoint, merged, saved)
    refusal = genai_graph.refusal(checkpoint.config) if task == "causal-lm" else f"the task is {task}"
    # a head with blocks of its own, or quantized, cannot share the embedding's table
    share = quantize == "none" and not (merged and "lm_head" in merged.modules)
    if refusal is None:
        layout = genai_graph.layout(weights, folder, precision=precision, share_embeddings=share)
    else:
        layout = torch_graph.layout(weights, folder, task=task, precision=precision, share_embeddings=share)
    weights = replace(weights, tied=layout.tied)
    modules, digest = finish(
        layout,
        weights,
        folder,
        quantize=quantize,
        group_size=group_size,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
    )
    for name in ("config.json", "generation_config.json"):
        if (checkpoint.folder / name).exists():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    hashes = {DATA: digest, MODEL: file_sha256(folder / MODEL)}
    return Graph("genai" if refusal is None else "torch", refusal or "onnxruntime-genai's builder knows this architecture", modules, hashes)
