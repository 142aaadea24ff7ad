"""Run exported graphs and their torch reference on a few tokens, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from diablo_export import opschema
from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.trainer.model import load_base, load_tuned

TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "text-classification"}
IDS = np.array([[5, 17, 254, 3, 90, 41, 7, 200, 11]], np.int64)
# float32 logits of magnitude 10 after two layers, summed in another order than torch does
LOGITS = 1e-4

Run = Callable[..., Array]


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def feeds(opened: Any, ids: Array = IDS) -> dict[str, Array]:
    """Inputs of a whole prompt: no tokens before it, nothing masked."""
    made: dict[str, Array] = {}
    for value in opened.get_inputs():
        if value.name.endswith((opschema.BLOCKS_SUFFIX, opschema.SCALES_SUFFIX)):
            continue
        if value.name == "input_ids":
            made[value.name] = ids
        elif value.name == "position_ids":
            positions = np.arange(ids.shape[1], dtype=np.int64)[None]
            made[value.name] = positions if len(value.shape) == 2 else np.stack([positions] * 3)
        elif value.name == "token_type_ids":
            made[value.name] = np.zeros_like(ids)
        elif value.name.endswith((".conv", ".recurrent")):  # states of one size
            made[value.name] = np.zeros((1, *value.shape[1:]), np.float32)
        elif value.name.startswith("past"):
            kind = np.float16 if "float16" in value.type else np.float32
            size = value.shape[3] if isinstance(value.shape[3], int) else 16  # every tiny model's head size
            made[value.name] = np.zeros((1, value.shape[1], 0, size), kind)
        else:
            made[value.name] = np.ones_like(ids)
    return made


def runner(file: Path) -> Run:
    """run(adapter file or None, ids, extra feeds) → logits."""
    opened = session(file)

    def run(adapter: Path | None = None, ids: Array = IDS, more: Mapping[str, Array] | None = None) -> Array:
        options = onnxruntime.RunOptions()
        if adapter is not None:
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(adapter))
            options.add_active_adapter(loaded)
        return np.asarray(opened.run(["logits"], {**feeds(opened, ids), **(more or {})}, options)[0])

    return run


def in_torch(model: Path, adapter: Path | None = None, ids: Array = IDS) -> Array:
    """The logits of the base, or of the tuned model."""
    if adapter is None:
        task = "text-classification" if "bert" in str(model) else "causal-lm"
        network, _ = load_base(model, task)
    else:
        network, _ = load_tuned(model, Adapter.load(adapter))
    with torch.no_grad():
        return np.asarray(network(torch.from_numpy(ids)).logits.float().numpy())
