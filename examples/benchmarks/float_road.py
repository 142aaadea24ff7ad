"""Merged in float, then everything to int4: `merge --quantize int4` beside AutoRound and GPTQModel on the same model.

    python examples/benchmarks/train_quality.py --data-dir DATA --output WORK --only shakespeare
    python examples/benchmarks/float_road.py --data-dir DATA --work WORK [--autoround PYTHON] [--gptqmodel PYTHON]

PYTHON is the interpreter of an environment that has the tool; a tool without one is left out. The tuned model is
TinyStories-656K with the Shakespeare adapter of train_quality.py. Every road is a command of its own, gets the same
text to calibrate on (drawn anew from the training text for each seed), and quantizes the seven projections of each
layer to int4 in groups of the same size, scales in 16 bits; the output head is put back to float. Judged in torch on
held-out text against the float tuned model. Prints a Markdown table, with standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from held_out import HeldOut, compared
from other_quantizers import LENGTH
from train_quality import write

from diablo_export import merge
from diablo_export.adapter import Adapter
from diablo_export.algorithms import HAVE_ZEROS
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.grid_network import grid_network
from diablo_export.converters.onnx_match import match
from diablo_export.packed.modules import stored
from diablo_export.quantization import Float32
from diablo_export.trainer.model import load_base
from diablo_export.trainer.targets import ALL, choose_targets

METHODS = ("rtn", "k_quant", "hqq", "gptq", "learned")
OURS = (sys.executable, "-c", "from diablo_export.cli import main; main()", "merge", "-q")
TOOLS = Path(__file__).absolute().parent / "other_quantizers.py"
ZEROS = {"hqq": 16, "k_quant": 4}  # bits of a zero point, where there are any
Weights = dict[str, Float32]


@dataclass(frozen=True)
class Cost:
    """Of one command.

    Attributes:
        seconds: on the clock.
        processor: seconds, of all its threads.
        megabytes: of memory at its peak.
    """

    seconds: float
    processor: float
    megabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="What train_quality.py --output wrote.")
    parser.add_argument("--autoround", type=Path, metavar="PYTHON")
    parser.add_argument("--gptqmodel", type=Path, metavar="PYTHON")
    parser.add_argument("--group-size", type=int, action="append", help="Default: 32 and 128.")
    parser.add_argument("--method", action="append", help=f"Of `merge`; default: {', '.join(METHODS)}.")
    parser.add_argument("--sequences", type=int, default=512, help="Of 128 tokens, that all calibrate on.")
    parser.add_argument("--tokens", type=int, default=8192, help="Of held-out text to judge on.")
    parser.add_argument("--seed", type=int, action="append", help="Of the text to calibrate on; default: 0, 1 and 2.")
    parser.add_argument("--iterations", type=int, default=200, help="Of AutoRound for each layer.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    for name in ("data_dir", "work", "autoround", "gptqmodel"):  # roads run in a folder that is thrown away
        if (given := getattr(options, name)) is not None:
            setattr(options, name, Path(given).absolute())
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(options.data_dir / "tinystories656k-hf", Path(scratch), options):
            print(row, flush=True)


def rows(base: Path, scratch: Path, options: argparse.Namespace) -> Iterator[str]:
    """The table: what each road leaves, one row for all seeds."""
    adapter = Adapter.load(options.work / "shakespeare-adapter")
    assert adapter.path is not None
    merge(base, adapter.path, scratch / "tuned")
    tuned, tokenizer = load_base(scratch / "tuned", "causal-lm")
    network, _ = load_base(base, "causal-lm")
    held = HeldOut(options.work / "shakespeare-held-out.jsonl", tokenizer, False, options.tokens)
    wanted, start = held.logits(tuned), held.logits(network)
    names = choose_targets(tuned, [ALL])
    texts = [drawn(options, tokenizer, scratch, seed) for seed in options.seed or (0, 1, 2)]
    yield "| group | method | bits | loss | KL from the float model | cosine | s | processor s | MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield f"| – | float | 32 | {held.figure(wanted):.4f} | 0 | 1 | | | |"
    for size in options.group_size or (32, 128):
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for text in texts:
            for name, weights, cost in roads(base, adapter, names, size, text, scratch, options):
                said = held.logits(with_weights(tuned, weights))
                kept = compared(wanted, start, said) | {"loss": held.figure(said)} | vars(cost)
                found[name].append(kept)
                print(size, text.stem, name, json.dumps(kept), file=sys.stderr, flush=True)
        for name, kepts in found.items():
            yield f"| {size} | {name} | {bits(name, size):.2f} | {row(kepts)} |"
        if differences := beside(found):
            yield f"\n{differences}\n"


def row(kepts: Sequence[dict[str, float]]) -> str:
    """Means over the seeds, with standard deviations of what a seed moves."""
    mean, spread = (
        {name: float(of([kept[name] for kept in kepts])) for name in kepts[0]} for of in (np.mean, _deviation)
    )
    figures = [f"{mean['loss']:.4f} ± {spread['loss']:.4f}", f"{mean['kl']:.4f} ± {spread['kl']:.4f}"]
    figures += [f"{mean['cosine']:.4f}", *(f"{mean[name]:.0f}" for name in ("seconds", "processor", "megabytes"))]
    return " | ".join(figures)


def beside(found: dict[str, list[dict[str, float]]]) -> str:
    """How far the best of ours is from the best of the others, on the same texts."""
    means = {name: np.mean([kept["kl"] for kept in kepts]) for name, kepts in found.items()}
    ours, others = (sorted((m, n) for n, m in means.items() if n.startswith("diablo") == own) for own in (True, False))
    if not ours or not others:
        return ""
    (_, best), (_, rival) = ours[0], others[0]
    shares = [1 - one["kl"] / two["kl"] for one, two in zip(found[best], found[rival], strict=True)]
    return f"{best} leaves {np.mean(shares):.1%} ± {_deviation(shares):.1%} less KL than {rival}"


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def bits(name: str, size: int) -> float:
    """Of a weight in the file, with its share of scale and zero point."""
    return 4 + (16 + ZEROS.get(name.rpartition(" ")[2], 0)) / size


def drawn(options: argparse.Namespace, tokenizer: Any, scratch: Path, seed: int) -> Path:
    """A file of paragraphs of the training text, drawn at random: as many as hold the sequences asked for."""
    lines = (options.work / "shakespeare.jsonl").read_text(encoding="utf-8").splitlines()
    paragraphs = [part for line in lines for part in json.loads(line)["text"].split("\n\n") if part.strip()]
    wanted, tokens = options.sequences * LENGTH, 0
    chosen = []
    for index in np.random.default_rng(seed).permutation(len(paragraphs)):
        if tokens > wanted:
            break
        chosen.append(paragraphs[index])
        tokens += len(tokenizer(f"{paragraphs[index]}\n\n", add_special_tokens=False)["input_ids"])
    file = scratch / f"text-{seed}.jsonl"
    write(file, [{"text": "\n\n".join(chosen)}])
    return file


def roads(
    base: Path, adapter: Adapter, names: list[str], size: int, text: Path, scratch: Path, options: argparse.Namespace
) -> Iterator[tuple[str, Weights, Cost]]:
    """Each road's name, the weights that it leaves of the projections, and what it took."""
    for method in options.method or METHODS:
        out = scratch / f"{method}-{size}-{text.stem}"
        command: list[object] = [*OURS, "--model", base, "--adapter", adapter.path, "--output", out]
        command += ["--quantize", "int4", "--group-size", size, "--method", method]
        command += ["--precision", "fp16", *([] if method in HAVE_ZEROS else ["--symmetric"])]
        command += [] if method == "rtn" else ["--calibration", text, "--min-survival", 0.5]
        cost = run(method, command)
        yield f"diablo-export, {method}", of_graph(out, adapter, base, names), cost
    for tool, python in (("autoround", options.autoround), ("gptqmodel", options.gptqmodel)):
        if python is not None:
            out = scratch / f"{tool}-{size}-{text.stem}"
            command = [python, TOOLS, tool, scratch / "tuned", text, out, "--group-size", size]
            cost = run(tool, [*command, "--iterations", options.iterations])
            yield tool, of_checkpoint(out, names), cost


def run(name: str, command: Sequence[object]) -> Cost:
    """Run a road, and measure it."""
    # GPTQModel refuses to work with fewer than two threads, and would compile its packing in C++
    workable = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryDirectory() as here:  # GPTQModel leaves logs
        quiet: dict[str, Any] = {"cwd": here, "stdout": subprocess.DEVNULL, "stderr": said}
        began = time.perf_counter()
        started = subprocess.Popen([str(part) for part in command], env=os.environ | workable, **quiet)
        _, status, used = os.wait4(started.pid, 0)
        seconds = time.perf_counter() - began
        started.returncode = os.waitstatus_to_exitcode(status)
        if started.returncode:
            said.seek(0)
            raise SystemExit(f"{name} failed:\n{said.read()[-2000:]}")
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3)


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
