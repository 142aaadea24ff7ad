"""Does onnxruntime run a graph? One that was built here is fed, one that was given is loaded: refusals come early."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diablo_export.console import log
from diablo_export.errors import ExportError, require
from diablo_export.measure.onnx_runner import OnnxRunner
from diablo_export.runtime import session

_TOKENS = np.ones(2, np.int64)


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
        runner = OnnxRunner(opened)
        logits = runner.decode(_TOKENS, _TOKENS) if runner.decodes else runner.prefill(_TOKENS)
    except Exception as error:  # onnxruntime's exceptions share no base but this
        raise ExportError(f"onnxruntime refuses the graph: {str(error).strip().splitlines()[-1]}") from error
    if not np.isfinite(logits).all():
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
