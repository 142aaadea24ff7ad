"""Export a branch, switch the adapter of 01 on and off in one session: python examples/03_swap.py MODEL"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import diablo_export
from diablo_export import runtime
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape

(model,) = sys.argv[1:]
diablo_export.export(model, {"mine": "adapter"}, "branch", overwrite=True)
session = runtime.session("branch/model.onnx")
adapter = runtime.load_adapter("branch/adapters/mine.onnx_adapter")
tokens = np.array([5, 6, 7, 8])
base = OnnxRunner(session, cache_shape=cache_shape(Path("branch"))).prefill(tokens)
tuned = OnnxRunner(session, adapter, cache_shape=cache_shape(Path("branch"))).prefill(tokens)
print(f"{len(adapter.names)} branches move the logits by up to {np.abs(tuned - base).max():.4f}")
