"""Train blocks on a frozen model: python examples/01_train.py MODEL train.jsonl"""

from __future__ import annotations

import sys

import diablo_export

model, data = sys.argv[1:]
done = diablo_export.train(
    model,
    data,
    "adapter",
    num_blocks=8,
    lr=5e-3,
    max_steps=20,
    batch_size=4,
    max_length=64,
    eval_fraction=0.2,
    overwrite=True,
)
print(f"{done.parameters:,} parameters trained; loss {done.loss:.3f} after {done.steps} steps")
