"""Merged in float, then everything to int4: `merge --quantize int4` beside AutoRound and GPTQModel on the same model.

    python examples/benchmarks/train_quality.py --data-dir DATA --output WORK --only shakespeare
    python examples/benchmarks/float_road.py --data-dir DATA --work WORK [--autoround PYTHON] [--gptqmodel PYTHON]

PYTHON is the interpreter of an environment that has the tool; a tool without one is left out. The tuned model is
TinyStories-656K with the Shakespeare adapter of train_quality.py. Every road quantizes the seven projections of each
layer to symmetric int4 in groups of the same size, with the same training text; the output head is left in float, or
put back to float. Judged in torch on held-out text against the tuned float model. Prints a Markdown table row each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from held_out import HeldOut, compared

from diablo_export import merge
from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.grid_network import grid_network
from diablo_export.converters.onnx_match import match
from diablo_export.packed.modules import stored
from diablo_export.quantization import Float32
from diablo_export.trainer.model import load_base
from diablo_export.trainer.targets import ALL, choose_targets

METHODS = ("rtn", "calibrated", "distilled", "gptq")
TOOLS = Path(__file__).parent / "other_quantizers.py"
Weights = dict[str, Float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="What train_quality.py --output wrote.")
    parser.add_argument("--autoround", type=Path, metavar="PYTHON")
    parser.add_argument("--gptqmodel", type=Path, metavar="PYTHON")
    parser.add_argument("--group-size", type=int, action="append", help="Default: 32 and 128.")
    parser.add_argument("--method", action="append", help=f"Of `merge`; default: {', '.join(METHODS)}.")
    parser.add_argument("--sequences", type=int, default=512, help="Of 128 tokens, that the tools calibrate on.")
    parser.add_argument("--tokens", type=int, default=8192, help="Of held-out text to judge on.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(options.data_dir / "tinystories656k-hf", Path(scratch), options):
            print(row, flush=True)


def rows(base: Path, scratch: Path, options: argparse.Namespace) -> Iterator[str]:
    """The table, row by row."""
    adapter, text = Adapter.load(options.work / "shakespeare-adapter"), options.work / "shakespeare.jsonl"
    assert adapter.path is not None
    merge(base, adapter.path, scratch / "tuned")
    tuned, tokenizer = load_base(scratch / "tuned", "causal-lm")
    network, _ = load_base(base, "causal-lm")
    held = HeldOut(options.work / "shakespeare-held-out.jsonl", tokenizer, False, options.tokens)
    wanted, start = held.logits(tuned), held.logits(network)
    names = choose_targets(tuned, [ALL])
    yield "| group | method | loss | KL from the float model | gain | cosine | processor time |"
    yield "|---|---|---|---|---|---|---|"
    yield f"| – | float | {held.figure(wanted):.4f} | 0 | 1 | 1 | |"
    for size in options.group_size or (32, 128):
        for name, weights, seconds in roads(base, adapter, names, size, text, scratch, options):
            found = held.logits(with_weights(tuned, weights))
            kept = compared(wanted, start, found)
            figures = f"{kept['kl']:.4f} | {kept['gain']:.3f} | {kept['cosine']:.4f}"
            yield f"| {size} | {name} | {held.figure(found):.4f} | {figures} | {seconds:.0f} s |"


def roads(
    base: Path, adapter: Adapter, names: list[str], size: int, text: Path, scratch: Path, options: argparse.Namespace
) -> Iterator[tuple[str, Weights, float]]:
    """Each road's name, the weights that it leaves of the projections, and its processor time."""
    for method in options.method or METHODS:
        began, out = time.process_time(), scratch / f"{method}-{size}"
        how: dict[str, Any] = {} if method == "rtn" else {"calibration": text}
        assert adapter.path is not None
        merge(base, adapter.path, out, quantize="int4", group_size=size, method=method, **how)
        yield f"diablo-export, {method}", of_graph(out, adapter, base, names), time.process_time() - began
    for tool, python in (("autoround", options.autoround), ("gptqmodel", options.gptqmodel)):
        if python is not None:
            began, out = sum(os.times()[2:4]), scratch / f"{tool}-{size}"
            command = [python, TOOLS, tool, scratch / "tuned", text, out, "--group-size", size]
            quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            # GPTQModel refuses to work with fewer than two threads, and would compile its packing in C++
            workable = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1", "HF_HUB_OFFLINE": "1"}
            environment = os.environ | workable
            given = [*map(str, command), "--sequences", str(options.sequences)]
            done = subprocess.run(given, env=environment, check=False, **quiet)
            if done.returncode:
                raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
            yield tool, of_checkpoint(out, names), sum(os.times()[2:4]) - began


def of_graph(folder: Path, adapter: Adapter, base: Path, names: list[str]) -> Weights:
    """The projections' weights in an int4 ONNX model."""
    graph = ir.load(folder / "model.onnx")
    network = grid_network(graph, folder, adapter, match(graph, adapter.modules), base).network
    return {name: network.get_submodule(name).weight.detach().numpy() for name in names}


def of_checkpoint(folder: Path, names: list[str]) -> Weights:
    """The projections' weights in a checkpoint in GPTQ's format, in this folder or in one within it."""
    checkpoint = Checkpoint.open(next(folder.rglob("config.json")).parent)
    found = {name: stored(checkpoint, name) for name in names}
    if absent := [name for name, one in found.items() if one is None]:
        raise SystemExit(f"{checkpoint.folder}: holds no quantized weight for {', '.join(absent)}")
    return {name: one.unpacked().values() for name, one in found.items() if one is not None}


@torch.no_grad()
def with_weights(network: torch.nn.Module, weights: Weights) -> torch.nn.Module:
    """The network with these weights of its projections: all of them, every time."""
    for name, values in weights.items():
        network.get_submodule(name).get_parameter("weight").copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return network


if __name__ == "__main__":
    main()
