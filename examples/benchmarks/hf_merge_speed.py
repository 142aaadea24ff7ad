"""Time and memory of merging a sharded bf16 checkpoint, beside copying it: python examples/benchmarks/hf_merge_speed.py

Makes a Llama-like checkpoint of random weights, an adapter for its q, k, v, up and down projections, and runs
`cp -r` with sync and the merge in turn. Each merge runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import BlockShape
from diablo_export.checkpoint import INDEX, write_safetensors
from diablo_export.fingerprint import fingerprint

HIDDEN, KV, FFN, VOCAB = 2048, 512, 8192, 32000  # Llama 3.2 1B, with a smaller vocabulary
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}  # fmt: skip
ADAPTED = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
MERGE = """
import sys, pathlib, diablo_export
diablo_export.merge(*sys.argv[1:])
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's pages too
print(int(status.split("VmHWM:")[1].split()[0]) / 1e3)
"""


def make(model: Path, adapter: Path, layers: int, num_blocks: int) -> None:
    """Write the random checkpoint, four layers a shard, and the adapter."""
    random = np.random.default_rng(0)
    model.mkdir()
    adapter.mkdir()
    modules, weight_map = {}, {}
    shards = [range(start, min(start + 4, layers)) for start in range(0, layers, 4)]
    for number, shard in enumerate(shards, 1):
        tensors = {}
        if number == 1:
            tensors["model.embed_tokens.weight"] = weight(random, VOCAB, HIDDEN)
        for layer in shard:
            for leaf, (out_features, in_features) in LAYER.items():
                name = f"model.layers.{layer}.{leaf}"
                tensors[f"{name}.weight"] = value = weight(random, out_features, in_features)
                if leaf.endswith(ADAPTED):
                    shape = BlockShape.for_linear(in_features, out_features, num_blocks)
                    blocks = random.normal(0, 0.01, shape.blocks).astype(np.float32)
                    modules[name] = AdaptedModule(name, blocks, in_features, out_features, fingerprint(value))
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        layout = {name: ("BF16", value.shape) for name, value in tensors.items()}
        write_safetensors(model / file, layout, tensors.items(), {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    Adapter(modules, num_blocks=num_blocks).save(adapter)


def weight(random: np.random.Generator, *shape: int) -> np.ndarray:
    return (random.random(shape, dtype=np.float32) * 0.1 - 0.05).astype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hf_merge_speed-") as name:
        folder = Path(name)
        make(folder / "model", folder / "adapter", options.layers, options.num_blocks)
        size = sum(file.stat().st_size for file in (folder / "model").iterdir()) / 1e9
        copies, merges, peaks = [], [], []
        for _ in range(options.rounds):
            os.sync()
            start = time.perf_counter()
            subprocess.run(["cp", "-r", folder / "model", folder / "copy"], check=True)
            os.sync()
            copies.append(time.perf_counter() - start)
            shutil.rmtree(folder / "copy")
            os.sync()
            start = time.perf_counter()
            arguments = [folder / "model", folder / "adapter", folder / "merged"]
            done = subprocess.run([sys.executable, "-c", MERGE, *arguments], check=True, capture_output=True, text=True)
            os.sync()
            merges.append(time.perf_counter() - start)
            peaks.append(float(done.stdout))
            shutil.rmtree(folder / "merged")
            print(f"copy {copies[-1]:6.2f} s   merge {merges[-1]:6.2f} s   peak {peaks[-1]:.0f} MB", flush=True)
        ratio = sorted(merges)[len(merges) // 2] / sorted(copies)[len(copies) // 2]
        print(f"{size:.2f} GB in bf16, {len(LAYER) * options.layers} projections, median of {options.rounds}: ", end="")
        by_round = sorted(merge / copy for merge, copy in zip(merges, copies, strict=True))[len(merges) // 2]
        print(f"merge / copy = {ratio:.2f} (by round {by_round:.2f}), peak {max(peaks):.0f} MB")


if __name__ == "__main__":
    main()
