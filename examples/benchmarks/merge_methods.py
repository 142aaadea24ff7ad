"""What each method of merging into int4 leaves of a fine-tune: weak, middle and strong adapters, on two real models.

    python examples/benchmarks/train_quality.py  --data-dir DATA --output WORK
    python examples/benchmarks/merge_methods.py  --data-dir DATA --work WORK [--only shakespeare|sst2] [--case NAME …]

Every adapter is merged into one and the same int4 ONNX model by each method, as the command `merge` does
it, with text that the model writes itself (--calibration: with the training text). Then everything is judged
on held-out data, in torch with the file's weights: loss or accuracy, survival gain and cosine on logits and
KL, all against the int4 base with the float branch. "requantized" is dequantize, add, requantize, as others do it.
Weak and middle adapters are trained here (20 steps each; 10 and 50 for the classifier); strong is train_quality.py's.
Prints one Markdown table row per method, and exits with 1 when `auto` misses a figure.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
from held_out import HeldOut, compared, sst2
from train_quality import minilm

from diablo_export import merge, train
from diablo_export.adapter import TASKS, Adapter
from diablo_export.converters import onnx_nodes
from diablo_export.converters.grid_network import GridNetwork, grid_network
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_groups import read
from diablo_export.converters.onnx_match import match
from diablo_export.manifest import read_manifest
from diablo_export.trainer.grid import GridLinear, grid_layers

METHODS = ("rtn", "refit", "calibrated", "distilled", "layerwise", "auto")
# name → (bits, group size, blocks or None for the strength's own)
CASES: dict[str, tuple[int, int, int | None]] = {
    "group 32": (4, 32, None),
    "group 128": (4, 128, None),
    "N = 16": (4, 32, 16),
    "2 bits": (2, 32, None),
}
STEPS = {"shakespeare": {"weak": (20, 1e-3), "middle": (20, 4e-3), "strong": (300, 1e-2)}}
STEPS["sst2"] = {"weak": (10, 1e-3), "middle": (50, 1e-3), "strong": (0, 1e-3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="What train_quality.py --output wrote.")
    parser.add_argument("--only", choices=["shakespeare", "sst2"])
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--strength", choices=["weak", "middle", "strong"], action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--calibration", action="store_true", help="Calibrate on the training text.")
    parser.add_argument("--seed", type=int, default=0, help="Of training the adapters.")
    parser.add_argument("--tokens", type=int, default=8192, help="Of held-out text to judge on.")
    parser.add_argument("--words", type=int, default=100, help="Leave out longer sentences of SST-2.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    missed: list[str] = []
    print("| model | case | adapter | method | task figure (branch) | gain | cosine | KL of kept | codes changed | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in ("shakespeare", "sst2"):
        if options.only in (None, name):
            for case in options.case or ["group 32"]:
                for strength in options.strength or ["weak", "middle", "strong"]:
                    missed += compare(name, case, strength, options)
    print("\n".join(missed) if missed else "every figure was reached")
    sys.exit(bool(missed))


def compare(name: str, case: str, strength: str, options: argparse.Namespace) -> list[str]:
    """Merge one adapter by every method and print a row each; returns what `auto` missed."""
    bits, group_size, blocks = CASES[case]
    base = options.data_dir / "tinystories656k-hf" if name == "shakespeare" else minilm()
    if name == "sst2":
        calibration, held_out = sst2(options.data_dir, options.work, options.words)
    else:
        calibration, held_out = (options.work / f"{part}.jsonl" for part in ("shakespeare", "shakespeare-held-out"))
    adapter = trained(name, base, strength, blocks, options.work, calibration, options.seed)
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "int4"
        given.mkdir()
        loaded = Adapter.load(adapter)
        task = next(option for option, kind in TASKS.items() if kind == loaded.task_type)
        with as_bits(bits):
            build_graph(base, given, task=task, quantize="int4", group_size=group_size, head=loaded)
        truth = Truth(given, loaded, base, held_out, options.tokens)
        print(
            f"| {name} | {case} | {strength} | int4 base | {truth.figure('base')} | 0 | – | {truth.base_kl:.2g} | 0 | |"
        )
        requantized = math.nan
        for method in options.method or METHODS:
            out = Path(scratch) / method
            more = {"calibration": calibration} if options.calibration and method not in ("rtn", "refit") else {}
            began = os.times()
            merge(given, adapter, out, method=method, reference=base, **more)
            ended = os.times()
            row = truth.judge(out)
            requantized = row["kl"] if method == "rtn" else requantized
            survival = read_manifest(out).get("survival") or {"method": method}
            seconds = ended.user - began.user + ended.system - began.system
            label = method if method != "auto" else f"auto: {survival['method']}"
            print(
                f"| {name} | {case} | {strength} | {label} | {row['said']} | {row['gain']:.3f} | {row['cosine']:.4f} "
                f"| {row['kl']:.2g} | {row['changed']:.1%} | {seconds:.0f} |", flush=True,
            )  # fmt: skip
            if method == "auto":
                where = f"{name}, {case}, {strength}"
                missed += [f"{where}: {fault}" for fault in faults(row, requantized, strength)]
    return missed


def faults(row: dict[str, Any], requantized: float, strength: str) -> list[str]:
    """Which of the figures that `auto` must reach were missed."""
    share = 0.5 if strength == "strong" else 0.25
    found = [] if abs(row["gain"] - 1) <= 0.03 else [f"gain {row['gain']:.3f} is not within 0.03 of 1"]
    found += [] if row["cosine"] >= 0.97 else [f"cosine {row['cosine']:.4f} is below 0.97"]
    found += [] if row["lost"] <= row["may_lose"] else [f"the task figure is {row['lost']:.4f} worse than the branch's"]
    if not math.isnan(requantized) and row["kl"] > share * requantized:
        found.append(f"KL {row['kl']:.2g} is above {share} of {requantized:.2g}")
    return found


class Truth:
    """An int4 model with the float branch beside it, on held-out data."""

    def __init__(self, given: Path, adapter: Adapter, base: Path, held_out: Path, tokens: int) -> None:
        graph = ir.load(given / "model.onnx")
        self._adapter = adapter
        self._made: GridNetwork = grid_network(graph, given, adapter, match(graph, adapter.modules), base)
        classifier = adapter.task_type == TASKS["text-classification"]
        self._held = HeldOut(held_out, self._made.tokenizer, classifier, tokens)
        self._base, self._branch = (self._held.logits(self._made.network, state) for state in ("base", "branch"))
        self.base_kl = compared(self._branch, self._base, self._base)["kl"]

    def judge(self, out: Path) -> dict[str, Any]:
        """Figures of a merged folder."""
        graph = ir.load(out / "model.onnx")
        layers: dict[str, GridLinear] = grid_layers(self._made.network)
        changed = total = 0
        for name, one in match(graph, self._adapter.modules).items():
            grid = read(one, out)
            layers[name].begin(grid)
            changed += int((grid.codes != self._made.grids[name].codes).sum())
            total += grid.codes.size
        found = self._held.logits(self._made.network, "grid")
        branch, ours = self._held.figure(self._branch), self._held.figure(found)
        lost, may = (branch - ours, 0.003) if self._held.classifier else (ours - branch, 0.005 * branch)
        kept = compared(self._branch, self._base, found)
        return {
            **kept, "said": f"{ours:.4f} ({branch:.4f})", "lost": lost, "may_lose": may, "changed": changed / total,
        }  # fmt: skip

    def figure(self, state: str) -> str:
        """Loss or accuracy of the base, beside the branch's."""
        found = self._base if state == "base" else self._branch
        return f"{self._held.figure(found):.4f} ({self._held.figure(self._branch):.4f})"


def trained(name: str, base: Path, strength: str, blocks: int | None, work: Path, data: Path, seed: int) -> Path:
    """The folder of an adapter, trained where it is not there yet."""
    strong = strength == "strong" and blocks is None
    if strong and not seed:
        return work / f"{name}-adapter"
    count = blocks or ((8 if strong else 4) if name == "shakespeare" else 12)
    folder = work / (f"{name}-{strength}-{count}" + (f"-{seed}" if seed else ""))
    if folder.exists():
        return folder
    steps, lr = STEPS[name][strength]
    task = "causal-lm" if name == "shakespeare" else "text-classification"
    train(
        base, data, folder, task=task, num_blocks=count, lr=lr, max_steps=steps or None, epochs=1, max_length=128,
        batch_size=16 if name == "shakespeare" else 32, dtype="float32", seed=seed,
        target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
        if strong and name == "shakespeare" else "all-linear",
    )  # fmt: skip
    return folder


@contextmanager
def as_bits(bits: int) -> Iterator[None]:
    """Have int4 mean another number of bits: nothing exports 2, but merges take what is there."""
    before = onnx_nodes.BITS["int4"]
    onnx_nodes.BITS["int4"] = bits
    try:
        yield
    finally:
        onnx_nodes.BITS["int4"] = before


if __name__ == "__main__":
    main()
