"""Run with the Python of optimum's environment: in_optimum.py FOLDER JOB prints what ORTModel makes of the folder.

An adapter takes effect through the options of the session's runs, which ORTModel leaves alone where it binds no inputs.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSequenceClassification


def activate(model: Any, adapter: Path | None) -> None:
    """Have every later run of the model use this adapter, or none."""
    options, session = onnxruntime.RunOptions(), model.session
    if adapter is not None:
        session.adapter = onnxruntime.LoraAdapter()  # the options do not keep it, and without it they run the base
        session.adapter.Load(str(adapter))
        options.add_active_adapter(session.adapter)
    session.run = functools.partial(type(session).run, session, run_options=options)


def measure(model: Any, ids: torch.Tensor, steps: int) -> dict[str, Any]:
    extra = {"token_type_ids": torch.zeros_like(ids)} if not steps else {}
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, **extra).logits
    tokens = []
    if steps:
        made = model.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
        tokens = made[0, ids.shape[1] :].tolist()
    return {"logits": logits.flatten().tolist(), "tokens": tokens}


def main() -> None:
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    kind = ORTModelForCausalLM if job["steps"] else ORTModelForSequenceClassification
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if "kernels" in job:
        settings.register_custom_ops_library(job["kernels"])
    model = kind.from_pretrained(folder, session_options=settings, use_io_binding=False)
    found = []
    for name in job["adapters"]:
        activate(model, None if name == "base" else folder / f"adapters/{name}.onnx_adapter")
        found.append(measure(model, torch.tensor([job["ids"]]), job["steps"]))
    print(json.dumps({"class": type(model).__name__, "found": found}))


main()
