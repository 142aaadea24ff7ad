"""Swap adapters in one session with onnxruntime alone: python examples/06_swap_plain.py FOLDER

FOLDER is what `diablo-export export` wrote for a decoder. Nothing of diablo-export is needed where this runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

STEPS = 6
PROMPT = [5, 17, 254, 3, 90]

(folder,) = (Path(argument) for argument in sys.argv[1:])
settings = onnxruntime.SessionOptions()
settings.log_severity_level = 3  # or a warning for each input that blocks can be fed to
# for the kernels: settings.register_custom_ops_library("libdiablo_kernels_ort.so")
session = onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])
inputs = {value.name: value for value in session.get_inputs()}
outputs = [value.name for value in session.get_outputs()]
half = any(value.type == "tensor(float16)" for value in inputs.values())


def generate(adapter: Path | None) -> list[int]:
    """The STEPS likeliest tokens after PROMPT, one by one, with the KV cache."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()  # to be kept: without it the options run the base, and nothing says so
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    # (batch, heads, past, head size)
    cache = {name: [1, value.shape[1], 0, value.shape[3]] for name, value in inputs.items() if name.startswith("past")}
    fed = {name: np.zeros(shape, np.float16 if half else np.float32) for name, shape in cache.items()}
    ids, past, tokens = PROMPT, 0, []
    while len(tokens) < STEPS:
        fed["input_ids"] = np.array([ids], np.int64)
        fed["attention_mask"] = np.ones((1, past + len(ids)), np.int64)
        if "position_ids" in inputs:
            fed["position_ids"] = np.arange(past, past + len(ids), dtype=np.int64)[None]
        results = dict(zip(outputs, session.run(outputs, fed, options), strict=True))
        past += len(ids)
        ids = [int(results["logits"][0, -1].argmax())]
        tokens += ids
        fed = {name.replace("present", "past_key_values"): results[name] for name in outputs if name != "logits"}
    return tokens


print("base", *generate(None))
for file in sorted((folder / "adapters").glob("*.onnx_adapter")):
    print(file.stem, *generate(file))
