"""What is left of a fine-tune after merge and export, on the two real models that train_quality.py adapts.

    python examples/benchmarks/train_quality.py  --data-dir DATA --output WORK
    python examples/benchmarks/export_quality.py --data-dir DATA --work WORK

Each adapter is merged in float and into int4, and exported as a branch beside a float and an int4 base; each folder
goes through `parity` on held-out text: 200 greedy tokens per prompt for the language model, the whole test set for
the classifier. The float branch without adapter is compared, bit for bit, with a base exported without branches.
Prints one Markdown table row per folder, and exits with 1 when a figure is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from train_quality import minilm

from diablo_export import export, merge, parity
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.runtime import session

ROADS = ("float merge", "float branch", "int4 merge", "int4 branch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="What train_quality.py --output wrote.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    work = options.work
    missed: list[str] = []
    print("| model | road | max abs Δ logit | KL mean | survival gain | cosine | task figure | 200 greedy tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for name, base, held_out in (
        ("shakespeare", options.data_dir / "tinystories656k-hf", work / "shakespeare-held-out.jsonl"),
        ("sst2", minilm(), work / "sst2-test.jsonl"),
    ):
        for road in ROADS:
            folder = make(road, base, work / f"{name}-adapter", work / f"{name}-{road.replace(' ', '-')}")
            report = parity(folder, data=held_out, steps=200, max_tokens=1_000_000 if name == "sst2" else 4096)
            print(row(name, road, report), flush=True)
            missed += [f"{name}, {road}: {fault}" for fault in faults(road, report)]
    missed += same_as_base(options.data_dir / "tinystories656k-hf", work)
    print("\n".join(missed) if missed else "every figure was reached")
    sys.exit(bool(missed))


def make(road: str, base: Path, adapter: Path, output: Path) -> Path:
    """Export one adapter on one road."""
    quantize = "int4" if road.startswith("int4") else "none"
    if road.endswith("merge"):
        merge(base, adapter, output, quantize=quantize, format="onnx", overwrite=True)
    else:
        export(base, adapter, output, quantize=quantize, overwrite=True)
    return output


def row(name: str, road: str, report: dict[str, Any]) -> str:
    """One line of the table."""
    adapter, decode = report["adapter"], report.get("decode")
    figures = report.get("perplexity") or report["accuracy"]
    kind = "perplexity" if "perplexity" in report else "accuracy"
    task = f"{kind} {figures['exported']:.4g} (tuned {figures['tuned']:.4g}, base {figures['base']:.4g})"
    same = "-" if decode is None else f"first divergence {decode['first_divergence']}"
    return (
        f"| {name} | {road} | {report['logits']['max_abs']:.2g} | {report['kl']['mean']:.2g} "
        f"| {adapter['survival_gain']:.4f} | {adapter['survival_cosine']:.4f} | {task} | {same} |"
    )


def faults(road: str, report: dict[str, Any]) -> list[str]:
    """Which of the figures that this road must reach were missed."""
    gain = report["adapter"]["survival_gain"]
    found = [] if report["verdict"] == "pass" else ["parity fails"]
    if road.startswith("float"):
        decode = report.get("decode")
        found += [] if report["logits"]["max_abs"] <= 1e-4 else ["logits differ by more than 1e-4"]
        found += [] if decode is None or decode["first_divergence"] is None else ["greedy text differs"]
    elif road == "int4 merge":
        found += [] if gain >= 0.95 else [f"survival gain {gain:.4f} is below 0.95"]
    else:
        found += [] if abs(gain - 1) <= 0.02 else [f"survival gain {gain:.4f} is not within 2 % of 1"]
    accuracy = report.get("accuracy")
    if accuracy is not None and accuracy["tuned"] - accuracy["exported"] > 0.01:
        found.append("accuracy is more than a point below tuned")
    return found


def same_as_base(model: Path, work: Path) -> list[str]:
    """The branch export without adapter, and a base that never had branches, on the same tokens: the same bits?"""
    plain = work / "plain-base"
    plain.mkdir(exist_ok=True)
    build_graph(model, plain)
    ids = np.random.default_rng(0).integers(3, 2000, (2, 64))
    outputs = [logits(session(folder / "model.onnx"), ids) for folder in (plain, work / "shakespeare-float-branch")]
    return [] if np.array_equal(*outputs) else ["the branch export without adapter is not the base bit for bit"]


def logits(model: ort.InferenceSession, ids: np.ndarray) -> np.ndarray:
    """Logits of a prefill without adapter."""
    feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in model.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return np.asarray(model.run(["logits"], feeds)[0])


if __name__ == "__main__":
    main()
