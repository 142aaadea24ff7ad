"""The record of a run for TensorBoard, beside training.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diablo_export.errors import require

# what a record holds → the name of its curve
_CURVES = {
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "eval_loss": "eval/loss",
    "eval_accuracy": "eval/accuracy",
}  # fmt: skip


@contextlib.contextmanager
def event_files(folder: Path | None, start: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Event files in a folder; yields what takes a record. No folder: it takes it and forgets.

    Args:
        folder: TensorBoard's log folder.
        start: finished steps; what an earlier run wrote of later ones is hidden.

    Raises:
        DependencyError: the package tensorboard is not there.
    """
    if folder is None:
        yield lambda record: None
        return
    require("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def add(record: dict[str, Any]) -> None:
        for name, curve in _CURVES.items():
            if name in record:
                writer.add_scalar(curve, record[name], record["step"])
        if "tokens" in record:
            writer.add_scalar("train/tokens_per_second", record["tokens"] / record["seconds"], record["step"])
        if "eval_loss" in record:
            writer.flush()

    try:
        yield add
    finally:
        writer.close()
