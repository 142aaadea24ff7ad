"""What is said of a merge into an int4 model: how far the file is the network that was judged, and what was tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export import runtime
from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.converters.calibration import Text
from diablo_export.converters.onnx_file import MODEL
from diablo_export.errors import InputError
from diablo_export.measure.metrics import cosine
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.requantize import Grid
from diablo_export.trainer.data import Encoded

_SAME, _RELATED = 0.98, 0.8  # cosine of the network's logits and the file's: activations in int8 leave 0.999


def against_runtime(ours: Array, item: Encoded, folder: Path, reference: str | Path) -> float:
    """Cosine of a sequence's logits in torch, with the weights of the file, and in onnxruntime.

    Raises:
        InputError: they are of two models.
    """
    runner = OnnxRunner(runtime.session(folder / MODEL, spin=False), cache_shape=cache_shape(folder))
    ids = item.ids.astype(np.int64)
    if runner.length is not None and len(ids) > runner.length and len(ours) == len(ids):  # each token's is its own
        ids, ours = ids[: runner.length], ours[: runner.length]
    alike = cosine(ours, runner.prefill(ids))
    said = f"{reference} with the file's int4 weights and the file in onnxruntime (cosine {alike:.3f})"
    if not alike >= _RELATED:
        raise InputError(
            f"{said} are two different models: they differ outside of the adapted layers. Give the float model "
            "that the file was made from as --reference, or choose --method rtn"
        )
    if alike < _SAME:
        log.warning("%s give somewhat different logits; run parity for figures of the file itself", said)
    return alike


def reported(
    rows: list[dict[str, Any]], asked: str, method: str, passed: bool, least: float, text: Text, alike: float
) -> dict[str, Any]:
    """The manifest's `survival`: of what was tried, and the method that was taken."""
    return {
        "method": method,
        "asked": asked,
        "min_survival": least,
        "passed": passed,
        "text": text.origin,
        "measured_on": f"{len(text.judged)} sequences, {sum(len(item.ids) for item in text.judged)} tokens",
        "reference": "the quantized base with the float branch, in torch",
        "runtime_cosine": alike,
        "tried": rows,
    }


def changed_codes(grids: Mapping[str, Grid], base: Mapping[str, Grid]) -> tuple[int, int]:
    """Codes that differ from the base's, and all codes of these modules."""
    changed = sum(int((grid.codes != base[name].codes).sum()) for name, grid in grids.items())
    return changed, sum(grid.codes.size for grid in grids.values())
