"""What `parity` costs beside one plain pass of both models: python examples/benchmarks/parity_cost.py --data-dir DATA

Plain is the least that a comparison can be: the tuned model in torch and the export in onnxruntime are loaded, read the
same sequences once, and decode the same prompts once. Beside it stand `parity --no-modules` and `parity`, each in a
process of its own, in turns. Time begins behind the imports, which all three need; peak is the largest resident memory.

Two models: TinyStories-656K from DATA, and a random Qwen2.5-0.5B (real sizes, made on the spot with adapter and int4
export of N = 64 blocks; needs 4 GB of disk and 6 GB of memory). Seven minutes on two cores that do nothing else, two
more to make the second model, which `--work DIR` keeps. Exits with 1 when a figure is missed. Where other programs run,
the ratios of processor time are the ones to go by, and with --threads 1 they are hardly blurred.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from whole_model import make_adapter, make_branch

TIMES, MEMORY = 2.5, 1.5  # wanted: at most so much of the plain pass's time, of the plain comparison's memory
WAYS = ("plain", "without modules", "with modules")


def plain(out: Path, options: dict[str, Any]) -> dict[str, float]:
    """One pass of both models: seconds of loading, and in all."""
    from diablo_export import runtime
    from diablo_export.adapter import Adapter
    from diablo_export.manifest import read_manifest
    from diablo_export.measure import compare, one_adapter, sources
    from diablo_export.measure.exported import states
    from diablo_export.measure.onnx_runner import cache_shape
    from diablo_export.measure.prompts import collect
    from diablo_export.measure.torch_runner import TorchRunner, context_length
    from diablo_export.trainer.model import load_tuned

    clock = Clock()
    manifest = read_manifest(out)
    ((name, folder),) = sources.adapter_folders(manifest, ()).items()
    with one_adapter.using_threads(options["threads"]):
        model, tokenizer = load_tuned(sources.base_folder(manifest, None, {name: folder}), Adapter.load(folder))
        tuned = TorchRunner(model)
        session = runtime.session(out / "model.onnx", threads=options["threads"], spin=False)
        exported, _, _ = states(manifest, session, out, name, cache_shape(out))
        clock.lap("loading")
        window = one_adapter.window(model)
        items = collect(tokenizer, options["data"], window=window, max_tokens=options["max_tokens"])
        for item in items:
            tuned.prefill(item.ids)
            exported.prefill(item.ids)
        for prompt in compare.decoding_prompts(items, tokenizer.eos_token_id, context_length(model), options["steps"]):
            tokens, _ = tuned.greedy(prompt, options["steps"])
            exported.decode(prompt, tokens)
    return clock.done() | {"tokens": sum(len(item.ids) for item in items)}


def whole(out: Path, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of `parity`."""
    importlib.import_module("diablo_export.measure.one_adapter")  # before the clock starts
    from diablo_export.measure.parity import parity

    clock = Clock()
    report = parity(out, **options)
    tokens = report["environment"]["tokens"]
    return clock.done() | {"tokens": tokens, "looked at": len(report["modules"])}


class Clock:
    """Seconds by the clock and of the processor since it was made."""

    def __init__(self) -> None:
        self.start, self.laps = os.times(), dict[str, float]()

    def lap(self, name: str) -> None:
        """Note the seconds so far."""
        now = os.times()
        self.laps[name] = now.elapsed - self.start.elapsed
        self.laps[f"{name}, processor"] = now.user + now.system - self.start.user - self.start.system

    def done(self) -> dict[str, float]:
        """All laps, and the whole."""
        self.lap("seconds")
        return self.laps


def measure(way: str, out: Path, options: dict[str, Any]) -> dict[str, float]:
    """One way in a process of its own; its peak in MB is added."""
    given = json.dumps([str(out), options])
    command = [sys.executable, __file__, "--way", way, given]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{way} of {out} failed with {process.returncode}")
    return {**json.loads(said), "peak": usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)}


def run_way(way: str, given: str) -> None:
    """The other side of `measure`."""
    out, options = json.loads(given)
    if way == "plain":
        print(json.dumps(plain(Path(out), options)))
    else:
        print(json.dumps(whole(Path(out), {**options, "modules": way == WAYS[2]})))


def small(data: Path, work: Path) -> Path:
    """An int4 branch of TinyStories-656K, made where it is not there yet."""
    import diablo_export

    out, model = work / "small", data / "tinystories656k-hf"
    if not out.exists():
        make_adapter(model, work / "small-adapter", 8)
        diablo_export.export(model, {"a": work / "small-adapter"}, out, quantize="int4")
    return out


def table(name: str, found: dict[str, list[dict[str, float]]]) -> bool:
    """Print the rows of one model; whether it is within what is wanted."""
    middle = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
    base, least = middle[WAYS[0]], middle[WAYS[1]]
    loading = f"{base['loading']:.1f} s of loading"
    titles = "time | over plain | processor | over plain | peak | over without modules"
    print(f"\n| {name}, {base['tokens']:.0f} tokens | {titles} |\n|---|---|---|---|---|---|---|")
    for way, figures in middle.items():
        more = f" ({loading})" if way == WAYS[0] else ""
        spent = " | ".join(
            f"{figures[clock]:.1f} s{more if clock == 'seconds' else ''} | {figures[clock] / base[clock]:.2f}"
            for clock in ("seconds", "seconds, processor")
        )
        peak = f"{figures['peak']:.0f} MB | {figures['peak'] / least['peak']:.2f}"
        print(f"| {way} | {spent} | {peak} |", flush=True)
    times = [figures["seconds"] / base["seconds"] for figures in middle.values()]
    return max(times) <= TIMES and middle[WAYS[2]]["peak"] / least["peak"] <= MEMORY


def main() -> None:
    """Measure, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--work", type=Path, help="keep models and exports here, to be used again")
    parser.add_argument("--only", choices=["small", "large"])
    parser.add_argument("--rounds", type=int, default=3, help="of the small model; the large one has one")
    parser.add_argument("--max-tokens", type=int, nargs=2, default=[8192, 1024], help="of the small and the large")
    parser.add_argument("--steps", type=int, default=32, help="to decode after each of four prompts")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="parity_cost-"))
    work.mkdir(parents=True, exist_ok=True)
    text, held = work / "text.txt", True  # this project's own pages: text that is always at hand
    text.write_text("\n\n".join(file.read_text() for file in sorted(Path(__file__).parents[2].glob("docs/*.md"))))
    try:
        for name, rounds, tokens in zip(("small", "large"), (options.rounds, 1), options.max_tokens, strict=True):
            if options.only not in (None, name):
                continue
            if name == "small" and options.data_dir is None:
                parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA; or --only large")
            out = small(Path(options.data_dir), work) if name == "small" else make_branch(work, 64, "fp32")
            given = {"data": str(text), "max_tokens": tokens, "steps": options.steps, "threads": options.threads}
            turns = [{way: measure(way, out, given) for way in WAYS} for _ in range(rounds)]
            held &= table(name, {way: [turn[way] for turn in turns] for way in WAYS})
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print("\nevery figure was reached" if held else f"\nwanted: {TIMES} x the time, {MEMORY} x the memory")
    sys.exit(not held)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        run_way(*sys.argv[2:4])
    else:
        main()
