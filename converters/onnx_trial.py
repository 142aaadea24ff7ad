"""Does onnxruntime run a graph? One that was built here is fed, one that was given is loaded: refusals come early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.errors import ExportError, require
from diablo_export.runtime import session

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_TOKENS = 2


def try_graph(file: Path) -> None:
    """Open a session on the CPU and run it, for a decoder once more on the cache that came out.

    Raises:
        ExportError: onnxruntime refuses the graph, or what comes out is NaN or inf.
    """
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # the arena would keep what is only needed once
    try:
        opened = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in opened.get_outputs()]
        result = dict(zip(names, opened.run(None, _feeds(opened, _TOKENS, {})), strict=True))
        if any(name.startswith("present.") for name in names):
            past = {name.replace("present.", "past_key_values.", 1): value for name, value in result.items()}
            result = dict(zip(names, opened.run(None, _feeds(opened, 1, past)), strict=True))
    except Exception as error:  # onnxruntime's exceptions share no base but this
        raise ExportError(f"onnxruntime refuses the graph: {str(error).strip().splitlines()[-1]}") from error
    if not np.isfinite(result["logits"]).all():
        raise ExportError("the graph runs, but its logits are not finite; check the model's weights")


def try_merged(given: Path, merged: Path) -> None:
    """Does onnxruntime load a graph with blocks in it? Where it does not load the given one either, that is only said.

    Raises:
        ExportError: it loads the given one alone.
    """
    try:
        session(merged)
    except ExportError as error:
        reason = str(error.__cause__ or error).strip().replace(str(merged), merged.name)  # a folder for the moment
        try:
            session(given)
        except ExportError as refused:
            log.warning("%s, so that what was merged into it was not tried", refused)
        else:
            raise ExportError(f"{given}: with the blocks in it, onnxruntime does not load it: {reason}") from error


def _feeds(session: Any, tokens: int, past: dict[str, Array]) -> dict[str, Array]:
    """Token 1 over and over, after the tokens that are in `past`."""
    before = next((value.shape[2] for name, value in past.items() if name.startswith("past_")), 0)
    feeds: dict[str, Array] = {}
    for entry in session.get_inputs():
        name, dtype = entry.name, _DTYPES[entry.type]
        if name.startswith("past_key_values."):
            empty = np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype)  # (batch, heads, tokens, head size)
            feeds[name] = past.get(name, empty)
        elif name == "attention_mask":
            feeds[name] = np.ones((1, before + tokens), dtype)
        elif name == "position_ids":
            feeds[name] = np.arange(before, before + tokens, dtype=dtype)[None]
        elif name == "token_type_ids":
            feeds[name] = np.zeros((1, tokens), dtype)
        else:
            feeds[name] = np.ones((1, tokens), dtype)
    return feeds
