"""Size of a patch: bytes of the patch, of the groups that the blocks touch, and of the model.

    python examples/benchmarks/patch_size.py [--num-blocks 64 16] [--scale 0.002 0.02] [--model M] [--work DIR]

Random int4 weights in groups of 32 (symmetric, float32 scales) of one decoder layer of Llama-3-8B's sizes, made on the
spot, with 2 % of its vocabulary: embeddings are no part of what is shared out here. Needs 4 GB of free disk. The blocks
are random, the weights' deviation is 0.02; each is merged by `merge --method rtn`, and the patch applied and compared.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_speed import save_adapter, save_random

from diablo_export import merge, patch
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_linears import linears

SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 2565,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def touched_bytes(base: Path, modules: list[dict[str, Any]]) -> int:
    """What the touched groups hold: codes, scales and zero points."""
    layers = {layer.name: layer for layer in linears(ir.load(base / "model.onnx"))}
    total = 0.0
    for module in modules:
        layer = layers[module["node"]]
        groups = layer.out_features * -(-layer.in_features // layer.group_size)
        stored = [value for value in (layer.weight, layer.scales, layer.zero_points) if value is not None]
        size = sum(value.const_value.nbytes for value in stored if value.const_value is not None)
        total += size / groups * module["touched_groups"]
    return int(total)


def row(work: Path, num_blocks: int, scale: float) -> str:
    """Merge, make the patch, apply it, compare; a line of the table."""
    adapter, merged, update, applied = (work / name for name in ("adapter", "merged", "update.patch", "applied"))
    save_adapter(work / "model", adapter, num_blocks, scale)
    manifest = merge(work / "base", adapter, merged, method="rtn", overwrite=True)
    start = time.process_time()
    size = patch.create(work / "base", merged, update, overwrite=True)["patch_bytes"]
    made = time.process_time() - start
    patch.apply(work / "base", update, output=applied, overwrite=True)
    spent = time.process_time() - start - made
    names = [path.name for path in merged.iterdir()]
    if filecmp.cmpfiles(merged, applied, names, shallow=False)[0] != names:
        raise SystemExit("the patched base is not the merged model")
    touched = touched_bytes(work / "base", manifest["modules"])
    model = sum(path.stat().st_size for path in merged.iterdir())
    return (
        f"| {num_blocks} | {scale:g} | {touched / 1e6:.2f} MB | {size / 1e6:.2f} MB | {size / touched:.2f} | "
        f"{size / model:.2%} | {made:.1f} s | {spent:.1f} s |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[64, 16])
    parser.add_argument(
        "--scale", type=float, nargs="+", default=[0.002, 0.02], help="deviation of the blocks' weights"
    )
    parser.add_argument("--model", type=Path, help="Hugging Face folder to take instead")
    parser.add_argument("--work", type=Path, help="keep the model here, to be used again")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="patch_size-"))
    try:
        if not (work / "base").exists():
            if options.model:
                shutil.copytree(options.model, work / "model")
            else:
                from transformers import LlamaConfig

                save_random(LlamaConfig(**SIZES), work / "model")
            (work / "base.partial").mkdir(parents=True)
            build_graph(work / "model", work / "base.partial", quantize="int4")
            (work / "base.partial").rename(work / "base")
        print("| N | blocks | touched groups | patch | patch / groups | of the model | create | apply |")
        print("|---|---|---|---|---|---|---|---|")
        for num_blocks in options.num_blocks:
            for scale in options.scale:
                print(row(work, num_blocks, scale), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
