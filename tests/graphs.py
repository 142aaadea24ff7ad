"""Helpers of the graph tests: build a graph, run it in plain onnxruntime, compare it with Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Logits = npt.NDArray[np.float32]
IDS = np.random.default_rng(0).integers(3, 300, (2, 12))
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def feeds(
    session: ort.InferenceSession, ids: Any, mask: Any, past: Mapping[str, Any] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a decoder; an empty cache where there is no past."""
    made: dict[str, npt.NDArray[Any]] = {}
    for entry in session.get_inputs():
        if entry.name == "input_ids":
            made[entry.name] = ids
        elif entry.name == "attention_mask":
            made[entry.name] = mask
        elif entry.name == "position_ids":
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
            made[entry.name] = positions if len(entry.shape) == 2 else np.stack([positions] * 3)
        else:
            state = entry.name.endswith((".conv", ".recurrent"))
            kept = entry.shape[1:] if state else (entry.shape[1], 0, entry.shape[3])
            shape = (len(ids), *kept)
            made[entry.name] = np.zeros(shape, _DTYPES[entry.type]) if past is None else past[entry.name]
    return made


def run(session: ort.InferenceSession, ids: Any, mask: Any, past: Mapping[str, Any] | None = None) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds(session, ids, mask, past)), strict=True))


def in_steps(session: ort.InferenceSession, ids: Any, prefill: int) -> Logits:
    """Logits of every position: `prefill` tokens at once, then one at a time on the cache."""
    result = run(session, ids[:, :prefill], np.ones_like(ids[:, :prefill]))
    logits = [result["logits"]]
    for step in range(prefill, ids.shape[1]):
        past = {
            name.replace("present.", "past_key_values." if name.endswith((".key", ".value")) else "past."): value
            for name, value in result.items()
        }
        result = run(session, ids[:, step : step + 1], np.ones_like(ids[:, : step + 1]), past)
        logits.append(result["logits"])
    return np.concatenate(logits, axis=1)


def padded(session: ort.InferenceSession, ids: Any, length: int) -> Logits:
    """Logits of a batch whose second row is cut to `length` and padded on the right."""
    mask = np.ones_like(ids)
    mask[1, length:] = 0
    logits: Logits = run(session, ids, mask)["logits"]
    return logits


def hugging_face(model: Path) -> Any:
    import torch
    import transformers

    network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return network.eval()


def logits_of(network: Any, ids: Any, **more: Any) -> Logits:
    """Hugging Face's logits, in float32."""
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in more.items()}
    with torch.no_grad():
        logits: Logits = network(input_ids=torch.from_numpy(ids), **tensors).logits.numpy()
    return logits
