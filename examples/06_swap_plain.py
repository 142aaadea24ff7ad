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
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# what is kept from token to token: keys and values, which grow, and the states of convolutions and linear attention,
# which do not; past_key_values.0.key and past.0.conv are given back as present.0.key and present.0.conv
caches = {name.partition(".")[2]: name for name in inputs if name.startswith("past")}


def generate(adapter: Path | None) -> list[int]:
    """The STEPS likeliest tokens after PROMPT, one by one, with the KV cache."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()  # to be kept: without it the options run the base, and nothing says so
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    fed = {}
    for name in caches.values():  # one sequence, and no token yet where the size is open
        shape = [1, *(size if isinstance(size, int) else 0 for size in inputs[name].shape[1:])]
        fed[name] = np.zeros(shape, TYPES[inputs[name].type])
    ids, past, tokens = PROMPT, 0, []
    while len(tokens) < STEPS:
        fed["input_ids"] = np.array([ids], np.int64)
        fed["attention_mask"] = np.ones((1, past + len(ids)), np.int64)
        if "position_ids" in inputs:
            positions = np.arange(past, past + len(ids), dtype=np.int64)
            # some models have three: time, height and width
            fed["position_ids"] = np.broadcast_to(positions, (*inputs["position_ids"].shape[:-2], 1, len(ids)))
        results = dict(zip(outputs, session.run(outputs, fed, options), strict=True))
        past += len(ids)
        ids = [int(results["logits"][0, -1].argmax())]
        tokens += ids
        fed = {caches[name.partition(".")[2]]: results[name] for name in outputs if name.startswith("present")}
    return tokens


print("base", *generate(None))
for file in sorted((folder / "adapters").glob("*.onnx_adapter")):
    print(file.stem, *generate(file))
