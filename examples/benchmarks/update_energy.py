"""How much of a fine-tune diagonal blocks and low-rank updates of as many parameters could hold: shares of its energy.

    python examples/benchmarks/update_energy.py --data-dir DATA

TinyStories-656K on tiny Shakespeare (DATA as in method_sweep.py; default: DIABLO_EXPORT_TEST_DATA), q, k, v, up and
down projections. Of two things: the gradient at the base, over the first six batches; and what 120 steps of full
fine-tuning at lr 1e-2 change. A JSON line for each and size: the share of the squared entries that lies under N blocks,
and in the best update of the rank with as many parameters. About half a minute on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from train_quality import write

from diablo_export.blockdiag import Array, BlockShape
from diablo_export.trainer.baselines import equal_rank
from diablo_export.trainer.batches import Batches
from diablo_export.trainer.loop import learning_rate, train_loop
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.prepare import open_base, prepare
from diablo_export.trainer.targets import choose_targets

STEPS, WARMUP, LR = 120, 6, 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    text = (options.data_dir / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        write(Path(work) / "plays.jsonl", [{"text": text[: len(text) * 9 // 10]}])
        lesson = prepare(
            open_base(options.data_dir / "tinystories656k-hf"), Path(work) / "plays.jsonl", task="causal-lm",
            autocast=False, device="cpu", max_length=128, eval_data=None, eval_fraction=0, seed=0,
        )  # fmt: skip
    network, batches = lesson.network, Batches(lesson.items, 8)
    objective = Objective(network, False, lesson.pad, torch.device("cpu"), False)
    targets = choose_targets(network)
    ranks = {count: equal_rank(network, targets, count) for count in (4, 8, 16)}
    weights = {name: network.get_parameter(f"{name}.weight") for name in targets}
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    network.requires_grad_(True)

    for part in (part for step in range(WARMUP) for part in batches(step)):
        objective.loss(part).backward()  # type: ignore[no-untyped-call]
    say("gradient", {name: weight.grad.numpy() for name, weight in weights.items()}, ranks)
    network.zero_grad()
    network.train()
    train_loop(
        torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0), batches=batches, loss=objective.loss,
        targets=objective.targets, steps=STEPS, rate=learning_rate(LR, STEPS, WARMUP, "linear"),
    )  # fmt: skip
    say("change", {name: (weight.detach() - base[name]).numpy() for name, weight in weights.items()}, ranks)


def say(what: str, found: Mapping[str, Array], ranks: Mapping[int, int]) -> None:
    total = sum(float((matrix**2).sum()) for matrix in found.values())
    for count, rank in ranks.items():
        blocks = sum(under_blocks(matrix, count) for matrix in found.values())
        low = sum(float((np.linalg.svd(matrix, compute_uv=False)[:rank] ** 2).sum()) for matrix in found.values())
        shares = {
            "num_blocks": count,
            "blocks": round(blocks / total, 3),
            "rank": rank,
            "low_rank": round(low / total, 3),
        }
        print(json.dumps({"what": what} | shares), flush=True)


def under_blocks(matrix: Array, count: int) -> float:
    shape = BlockShape.for_linear(matrix.shape[1], matrix.shape[0], count)
    return sum(float((matrix[outputs, inputs] ** 2).sum()) for inputs, outputs in shape.slices())


if __name__ == "__main__":
    main()
