"""What every runtime must give: the numbers of stock onnxruntime, without kernels and without a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diablo_export.blockdiag import Array
from tests.onnx_runs import IDS, runner

PROMPT = [int(token) for token in IDS[0]]
STEPS = 6
ADAPTERS = ("base", "a", "b", "base")  # the last one shows that nothing of an adapter stays behind


@dataclass(frozen=True)
class Wanted:
    """Logits of the prompt, flat, and the likeliest tokens after it."""

    logits: Array
    tokens: list[int]


def wanted(folder: Path, name: str, steps: int = STEPS, prompt: list[int] = PROMPT) -> Wanted:
    """What the folder's adapter gives; `base` is none. No tokens for a classifier: `steps` is 0."""
    run = runner(folder / "model.onnx")
    adapter = None if name == "base" else folder / f"adapters/{name}.onnx_adapter"
    logits, ids = run(adapter, np.array([prompt], np.int64)), list(prompt)
    for _ in range(steps):  # the whole text again for each token
        ids.append(int(run(adapter, np.array([ids], np.int64))[0, -1].argmax()))
    return Wanted(logits.ravel(), ids[len(prompt) :])
