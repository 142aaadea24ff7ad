"""A short run of `train`, and what it leaves: for tests of training and of resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = "the cat sat on the mat and the dog sat on the log. "
# two and a half epochs of 3 steps each, two batches per step, with warm-up, clipping and held-out text
RUN: dict[str, Any] = {
    "num_blocks": 4, "lr": 0.02, "max_steps": 8, "batch_size": 2, "grad_accumulation": 2, "max_length": 16,
    "schedule": "cosine", "eval_fraction": 0.1, "eval_every": 3, "seed": 3,
}  # fmt: skip


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def same_weights(first: Path, second: Path) -> bool:
    return (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()
