"""Padded batches: sequences of different lengths in one run must give the logits that each gives alone.

Right padding is for everything that takes an attention mask. Left padding moves a sequence's positions, so a graph must
take these as well; onnxruntime's GroupQueryAttention counts positions from the left whatever the mask says, and is not
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array

if TYPE_CHECKING:
    from diablo_export.measure.compare import Runner
    from diablo_export.measure.prompts import Ids, Sample
    from diablo_export.measure.torch_runner import TorchRunner

_LENGTHS = (24, 17, 11, 5)  # tokens of a batch's rows, at most: none a multiple of another
# a torch model whose own padded logits are farther off than this does not take such padding, so its export need not
_HELD_IN_TORCH = 1e-3


@dataclass(frozen=True)
class Padded:
    """Sequences in one rectangle; all (rows, tokens), int64."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]  # 1 where a token is
    positions: npt.NDArray[np.int64]  # of each token in its own sequence

    def unpadded(self, logits: Array) -> list[Array]:
        """Each row's own logits: (rows, tokens, classes) → (own tokens, classes); a classifier's → (1, classes)."""
        if logits.ndim == 2:
            return list(logits[:, None])
        return [row[real] for row, real in zip(logits, self.mask.astype(np.bool_), strict=True)]


def pad(rows: Sequence[Ids], token: int, *, left: bool = False, length: int | None = None) -> Padded:
    """Fill rows up to `length`, or to the longest of them, with `token` at the right or the left."""
    width = max(length or 0, *(len(row) for row in rows))
    ids = np.full((len(rows), width), token, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        own = slice(width - len(row), None) if left else slice(len(row))
        ids[index, own], mask[index, own] = row, 1
    return Padded(ids, mask, np.maximum(mask.cumsum(-1) - 1, 0))


def compare(
    tuned: TorchRunner, exported: Runner, samples: Sequence[Sample], graph: Path | None, *, classifier: bool
) -> dict[str, Any] | None:
    """How far padding moves logits: the largest difference from one sequence at a time, over the logits' deviation.

    Args:
        tuned: the torch model; padding that it does not take itself is not asked of the export.
        exported: the export, its adapter on.
        samples: what rows are cut from.
        graph: the export's ONNX file; None where it runs in torch.
        classifier: whether the model is one; it may read from both sides, and is padded at the right only.

    Returns:
        `{"lengths", "right", "left", "torch_right", "torch_left"}`, a side None that the graph does not take; None
        where it takes no batches, no attention mask, or all samples are one token long.
    """
    rows = [samples[index % len(samples)].ids[:length] for index, length in enumerate(_LENGTHS)]
    takes_batches, takes_left = (True, True) if graph is None else _takes(graph)
    if not takes_batches or len({len(row) for row in rows}) == 1:
        return None
    token = int(getattr(tuned.model.config, "pad_token_id", None) or 0)
    found: dict[str, Any] = {"lengths": [len(row) for row in rows]}
    for side in ("right", "left"):
        asked = side == "right" or (takes_left and not classifier)
        found[f"torch_{side}"] = in_torch = _moved(tuned, rows, token, side) if asked else None
        held = in_torch is not None and in_torch < _HELD_IN_TORCH
        found[side] = _moved(exported, rows, token, side) if held else None
    return found


def _moved(runner: Runner, rows: Sequence[Ids], token: int, side: str) -> float:
    batch = runner.batch(rows, token, left=side == "left")
    alone = [runner.prefill(row) for row in rows]
    far = [np.abs(one - other).max() for one, other in zip(batch, alone, strict=True)]
    deviation = float(np.concatenate(alone).std())
    return float(np.max(far)) / max(deviation, 1e-12)  # numpy's max keeps a NaN


def _takes(file: Path) -> tuple[bool, bool]:
    """(whether a graph takes padded batches, whether at the left, too)."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    inputs = {value.name: value for value in graph.input}
    if not {"input_ids", "attention_mask"} <= set(inputs):
        return False, False
    rows, tokens = list(inputs["input_ids"].type.tensor_type.shape.dim)[:2]
    counted = any(node.op_type == "GroupQueryAttention" for node in graph.node)
    return not rows.dim_value and not tokens.dim_value, "position_ids" in inputs and not counted
