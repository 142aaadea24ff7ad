"""What a branch costs in a whole model: python examples/benchmarks/whole_model.py [--work DIR] [--threads 1 2]

A random Qwen2.5-0.5B (real sizes, made on the spot, 1 GB) to int4 with a branch of N = 64 blocks on all seven
projections of each layer, timed by `bench` beside its base without branches and LoRA branches of as many parameters.
Needs 4 GB of disk and 6 GB of memory, and eight minutes of a machine that does nothing else.

Two sessions of one graph can differ by 5 % as long as they live, by where their memory lies. So all get huge pages
(on Linux with glibc, where madvise may ask for them), decoding, which is quick to time, is timed in several processes,
and `base-again` shows what is left of that. With one thread the ratios are of processor time, which other programs
blur less; with more they are of time by the clock.

Free of both is the share of a run that onnxruntime's profiler finds in the nodes of the branches: what it says of the
other nodes of the same run is what the base takes. At one token the profiler itself takes too long for that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx_speed import make_model

from diablo_export import runtime
from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import BlockShape
from diablo_export.checkpoint import Checkpoint
from diablo_export.fingerprint import fingerprint
from diablo_export.swap import write_adapter
from diablo_export.timing.graphs import with_lora
from diablo_export.timing.sessions import Variant, prepared

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KERNELS, EMPTY, LORA, NO_LORA = "branch-kernels", "empty-kernels", "lora", "empty-lora"
# what → (what to time beside the base, processes, options of bench); prompts of 512 take ten seconds a run
WORK: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {
    "decode": (("base-again", "branch", KERNELS, "empty", EMPTY, LORA, NO_LORA), 2, {"prefill": [], "rounds": 25}),
    "prefill 128": (("branch", KERNELS, EMPTY, LORA), 1, {"prefill": [128], "past": None, "rounds": 3}),
    "prefill 512": ((KERNELS, LORA), 1, {"prefill": [512], "past": None, "rounds": 3}),
}
CALL = """
import json, sys
import diablo_export
print(json.dumps(getattr(diablo_export, sys.argv[1])(**json.loads(sys.argv[2]))))
"""
WANTED = {"decode": 1.02, "prefill 128": 1.015, "prefill 512": 1.015}
WANTED_EMPTY = 1.01


def make_adapter(model: Path, folder: Path, num_blocks: int) -> None:
    """Random blocks on the seven projections of each layer."""
    random, modules = np.random.default_rng(0), {}
    for info in Checkpoint.open(model):
        name = info.name.removesuffix(".weight")
        if name.endswith(TARGETS) and name != info.name:
            weight = info.read()
            shape = BlockShape.for_linear(weight.shape[1], weight.shape[0], num_blocks)
            blocks = random.normal(0, 0.01, shape.blocks).astype(np.float32)
            modules[name] = AdaptedModule(name, blocks, weight.shape[1], weight.shape[0], fingerprint(weight))
    folder.mkdir(parents=True)
    Adapter(modules, "CAUSAL_LM", str(model), num_blocks, list(TARGETS)).save(folder)


def make_branch(work: Path, num_blocks: int, block_dtype: str) -> Path:
    """The branch export, made where it is not there yet."""
    model, adapter, branch = work / "model", work / f"adapter-{num_blocks}", work / f"branch-{num_blocks}-{block_dtype}"
    if not (model / "config.json").exists():
        make_model(model)
    if not adapter.exists():
        make_adapter(model, adapter, num_blocks)
    if not branch.exists():
        options = {"quantize": "int4", "block_dtype": block_dtype}
        call("export", model=str(model), adapter=str(adapter), output=str(branch), **options)
    return branch


def call(verb: str, **options: Any) -> dict[str, Any]:
    """A function of diablo_export, in a process of its own."""
    command = [sys.executable, "-c", CALL, verb, json.dumps(options)]
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(branch: Path, what: str, threads: int, rounds: int | None) -> dict[str, list[float]]:
    """The ratios to the base, and of adapter to no adapter in one session; a value for each round of each process."""
    variants, processes, given = WORK[what]
    options = {**given, "only": variants, "threads": threads, "seconds": 600}
    if rounds is not None:
        options["rounds"] = rounds
    clock = "processor_turns" if threads == 1 else "turns"
    ratios: dict[str, list[float]] = {}
    for _ in range(processes):
        (work,) = call("bench", out=str(branch), **options)["work"]
        turns = {name: np.array(figures[clock]) for name, figures in work["variants"].items()}
        over = {name: (name, "base") for name in turns if name != "base"}
        for name, empty in ((KERNELS, EMPTY), (LORA, NO_LORA)):
            if empty in turns:
                over[f"{name} / {empty}"] = (name, empty)
        for title, (name, other) in over.items():
            ratios.setdefault(title, []).extend(turns[name] / turns[other])
    return ratios


def share(branch: Path, tokens: int, threads: int, what: str) -> float:
    """The time in the nodes of all branches, kernels or LoRA, over that in all other nodes; the least of three runs."""
    import onnxruntime

    adapter = runtime.load_adapter(next((branch / "adapters").iterdir()))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.enable_profiling = 3, threads, True
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(branch))
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        model = (branch / "model.onnx").read_bytes()
        if what == LORA:
            model, values = with_lora(branch / "model.onnx", adapter.values())
            write_adapter(Path(folder) / "lora", values, adapter.base)
            adapter = runtime.load_adapter(Path(folder) / "lora")
        elif runtime.register(options) is None:
            raise SystemExit(runtime.LIBRARY_HELP)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        run = prepared(Variant(session, adapter), branch, tokens, 0)
        for _ in range(3):
            run()
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [(each["name"], each["dur"]) for each in events if each["name"].endswith("_kernel_time")]
    each_run = [nodes[len(nodes) // 3 * i : len(nodes) // 3 * (i + 1)] for i in range(3)]
    mark = "/BlockDiagMatMul" if what == KERNELS else "/lora"
    sums = [(sum(d for n, d in one if mark in n), sum(d for n, d in one if mark not in n)) for one in each_run]
    return min(ours / others for ours, others in sums)


def row(ratios: dict[str, list[float]], name: str) -> str:
    """Median and quartiles of a variant's ratios."""
    if name not in ratios:
        return "–"
    low, middle, high = np.quantile(ratios[name], (0.25, 0.5, 0.75))
    if len(ratios[name]) == 1:
        return f"{middle:.3f}"
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def verdicts(found: dict[tuple[int, str], dict[str, list[float]]]) -> list[str]:
    """What was wanted, and whether it is so."""
    lines = []
    for (threads, what), ratios in found.items():
        middle = {name: statistics.median(values) for name, values in ratios.items()}
        limits = [(KERNELS, WANTED[what], f"{WANTED[what]}"), (KERNELS, middle[LORA], f"LoRA's {middle[LORA]:.3f}")]
        limits.append((EMPTY, WANTED_EMPTY, f"{WANTED_EMPTY}"))
        for name, limit, said in limits:
            if name in middle:
                held = "yes" if middle[name] <= limit else "NO"
                lines.append(f"{held:3} {what}, {threads} thread(s): {name} {middle[name]:.3f}, wanted {said}")
    return lines


def main() -> None:
    """Make, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep model and exports here, to be used again")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--what", choices=[*WORK], nargs="*", default=[*WORK])
    parser.add_argument("--rounds", type=int, help="of each process, in place of 25 for decode and 3 for prompts")
    parser.add_argument("--num-blocks", type=int, default=64)
    parser.add_argument("--block-dtype", choices=["fp32", "fp16", "int8"], default="int8")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="whole_model-"))
    try:
        branch = make_branch(work, options.num_blocks, options.block_dtype)
        found = {}
        for threads in options.threads:
            for what in options.what:
                found[threads, what] = measure(branch, what, threads, options.rounds)
                if (threads, what) == (1, "prefill 128"):
                    for name in (KERNELS, LORA):
                        found[threads, what][f"{name}, profiler"] = [1 + share(branch, 128, threads, name)]
                print(f"{what}, {threads} thread(s): done", file=sys.stderr, flush=True)
        print(
            f"\nN = {options.num_blocks}, {options.block_dtype} blocks; median (quartiles) of the ratios to the base\n"
        )
        print("| |" + "".join(f" {what}, {threads} thread{'s' * (threads > 1)} |" for threads, what in found))
        print("|---|" + "---|" * len(found))
        for name in dict.fromkeys(name for ratios in found.values() for name in ratios):
            print(f"| `{name}` |" + "".join(f" {row(ratios, name)} |" for ratios in found.values()))
        print("\n" + "\n".join(verdicts(found)))
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
