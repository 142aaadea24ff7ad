"""Better 2-bit bases: GPTQ checkpoints whose codes are chosen in several ways, and DiaBlo trained beside each as it is.

    python examples/benchmarks/low_bit_base.py --data-dir DATA [--work DIR] [--ways NAMES] [--steps 100]

DATA holds tinystories656k-hf/, tinystories-text/ and tinyshakespeare/input.txt (default: DIABLO_EXPORT_TEST_DATA). All
projections of the transformer's blocks are quantized, in symmetric groups of 32; embeddings and head stay float.
Calibration text is the model's own, TinyStories. Prints a JSON line for each way: held-out loss in the model's own
domain and on Shakespeare, and that on Shakespeare after training. About a minute each on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from train_quality import write

from diablo_export import train
from diablo_export.packed import fresh
from diablo_export.packed.grid import PackedGrid
from diablo_export.quantization import Float32
from diablo_export.trainer.model import load_base
from diablo_export.trainer.moments import InputMoments
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.prepare import open_base, prepare

SIZE, BITS = 32, 2
CONFIG = fresh.config(BITS, SIZE, symmetric=True)
Way = Callable[[Float32, Float32], PackedGrid]  # (weight (out, in), E[x xᵀ]) → its codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--work", type=Path, help="Keep checkpoints and adapters here.")
    parser.add_argument("--ways", default="float," + ",".join(WAYS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.06)
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        texts(options.data_dir, work)
        for way in options.ways.split(","):
            base = options.data_dir / "tinystories656k-hf"
            if way != "float":
                base = quantized(base, work / way, WAYS[way], work)
            print(json.dumps({"way": way} | measured(base, work, way, options.steps, options.lr)), flush=True)


def texts(data: Path, work: Path) -> None:
    """The model's own domain and Shakespeare, to learn or calibrate on and held out."""
    stories, plays = data / "tinystories-text", (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(plays) * 9 // 10
    found = {
        "own": (stories / "tinystories_train_head.txt").read_text(encoding="utf-8")[:120_000],
        "own-held": (stories / "tinystories_val.txt").read_text(encoding="utf-8")[:40_000],
        "plays": plays[:cut], "plays-held": plays[cut : cut + 40_000],
    }  # fmt: skip
    for name, text in found.items():
        write(work / f"{name}.jsonl", [{"text": text}])


def quantized(model: Path, folder: Path, way: Way, work: Path) -> Path:
    """`model` as a GPTQ checkpoint with the codes of `way`."""
    network, _ = load_base(model, "causal-lm")
    items = prepared(model, work, "own").items[:150]
    moments = InputMoments(network, items, batch_size=8)
    tensors: dict[str, Any] = {}
    for name, value in load_file(model / "model.safetensors").items():
        if "_proj." not in name:
            tensors[name] = value
            continue
        module = name.removesuffix(".weight")
        made = fresh.tensors(way(value.astype(np.float32), moments(module)), CONFIG)
        tensors |= {f"{module}.{key}": part for key, part in made.items()}
    shutil.copytree(model, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return folder


def prepared(model: Path, work: Path, text: str) -> Any:
    return prepare(
        open_base(model), work / f"{text}.jsonl", task="causal-lm", autocast=False, device="cpu", max_length=128,
        eval_data=work / f"{text}-held.jsonl", eval_fraction=0, seed=0,
    )  # fmt: skip


def measured(base: Path, work: Path, way: str, steps: int, lr: float) -> dict[str, float]:
    own = prepared(base, work, "own")
    objective = Objective(own.network, False, own.pad, torch.device("cpu"), False)
    before = objective.evaluate(own.held, 16)["eval_loss"]
    done = train(
        base, work / "plays.jsonl", work / f"adapter-{way}", num_blocks=8, lr=lr, max_steps=steps, batch_size=8,
        max_length=128, eval_data=work / "plays-held.jsonl", eval_every=steps, dtype="float32", overwrite=True,
    )  # fmt: skip
    plays = [record["eval_loss"] for record in done.evaluations]
    return {"own": round(before, 4), "plays": round(plays[0], 4), "plays_trained": round(plays[-1], 4)}


def by(method: str) -> Way:
    return lambda weight, moments: fresh.quantized(weight, BITS, SIZE, True, method, moments)


def magr(weight: Float32, moments: Float32, alpha: float = 0.01, steps: int = 100) -> Float32:
    """MagR (arXiv 2406.00800): argmin ½ (w − w₀)ᵀ H (w − w₀) + α ‖w‖∞ for each output, by proximal gradient steps.

    The proximal step of α ‖·‖∞ takes off the projection onto the ℓ₁ ball of radius α; H is scaled to norm 1.
    """
    moments = moments / np.linalg.eigvalsh(moments)[-1]
    found = weight.copy()
    for _ in range(steps):
        moved = (found - (found - weight) @ moments).astype(np.float32)
        found = moved - onto_l1_ball(moved, alpha)
    return found


def onto_l1_ball(rows: Float32, radius: float) -> Float32:
    """The nearest point of the ℓ₁ ball to each row."""
    sizes = np.abs(rows)
    ordered = -np.sort(-sizes, 1)
    excess = np.cumsum(ordered, 1) - radius
    counts = np.arange(1, rows.shape[1] + 1)
    last = (ordered > excess / counts).sum(1) - 1
    level = np.maximum(excess[np.arange(len(rows)), last] / (last + 1), 0)
    return np.asarray(np.sign(rows) * np.maximum(sizes - level[:, None], 0), np.float32)


WAYS: dict[str, Way] = {
    "nearest": by("rtn"),
    "fitted": by("refit"),
    "gptq": by("gptq"),
    "calibrated": by("calibrated"),
    "magr+nearest": lambda weight, moments: by("rtn")(magr(weight, moments), moments),
    "magr+calibrated": lambda weight, moments: by("calibrated")(magr(weight, moments, 0.001), moments),
}

if __name__ == "__main__":
    main()
