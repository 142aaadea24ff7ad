"""What it costs to swap adapters in a running session: python examples/benchmarks/swap_cost.py

Exports a random decoder of Qwen2.5-0.5B's shape (vocabulary of 4096) with two adapters of different block counts on all
seven projections, and decodes one token at a time on a KV cache of 128: with the base, with A, with B, each twice in a
row, over and over. The first of two is the run after a swap. Once through the run options, once with I/O binding, where
a swap takes a new binding. Times are processor time of the one thread that computes; ratios are taken within a round,
and their median and quartiles are printed. Then loading an adapter beside opening the model, and the memory that swaps
leave behind.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export import runtime
from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import BlockShape
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.export import export
from diablo_export.fingerprint import fingerprint

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
PAST = 128  # tokens in the KV cache
WARM = 3  # runs of each before anything is timed
LOADS = 20

Step = Callable[[runtime.SwapAdapter | None], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A Hugging Face decoder instead of the random one.")
    parser.add_argument("--layers", type=int, default=24, help="Of the random one.")
    parser.add_argument("--num-blocks", type=int, nargs=2, default=[64, 32], help="Of adapter A and of adapter B.")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--block-dtype", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--swaps", type=int, default=1000, help="After which memory is compared.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swap_cost-") as name:
        work = Path(name)
        model = options.model or make_model(work / "model", options.layers)
        adapters = {
            label: make_adapter(model, work / label, blocks)
            for label, blocks in zip("AB", options.num_blocks, strict=True)
        }
        export(model, adapters, work / "out", quantize=options.quantize, block_dtype=options.block_dtype)
        print(f"blocks in {options.block_dtype}, base {options.quantize}, kernels: {runtime.find_library()}")
        measure(work / "out", options.rounds, options.swaps)


def make_model(folder: Path, layers: int) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=layers))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, num_blocks: int) -> Path:
    """Random blocks on every linear layer of the decoder's blocks."""
    random, modules = np.random.default_rng(num_blocks), {}
    for info in Checkpoint.open(model):
        name, leaf = info.name.removesuffix(".weight"), info.name.rpartition(".")[2]
        if leaf == "weight" and ".layers." in name and len(info.shape) == 2:
            out_features, in_features = info.shape
            shape = BlockShape.for_linear(in_features, out_features, num_blocks)
            blocks = random.normal(0, 0.01, shape.blocks).astype(np.float32)
            modules[name] = AdaptedModule(name, blocks, in_features, out_features, fingerprint(info.read()))
    folder.mkdir()
    Adapter(modules, base_model=str(model), num_blocks=num_blocks).save(folder)
    return folder


def measure(folder: Path, rounds: int, swaps: int) -> None:
    started = time.process_time()
    session = runtime.session(folder / "model.onnx", threads=1)
    opening = time.process_time() - started
    files = [folder / "adapters" / f"{name}.onnx_adapter" for name in "AB"]
    a, b = (runtime.load_adapter(file) for file in files)
    feeds = token(session)
    print(f"{len(a.names)} inputs; files of {', '.join(f'{file.stat().st_size / 1e6:.1f} MB' for file in files)}")
    print("| way | swapped to | first run / next run: median (quartiles) | next run |")
    print("|---|---|---|---|")
    for way, step in (("run options", by_options(session, feeds)), ("I/O binding", by_binding(session, feeds))):
        times = rounds_of(step, [None, a, b], rounds)
        for name, pairs in zip(("base", "A", "B"), times, strict=True):
            ratios = [first / following for first, following in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"| {way} | {name} | {middle:.3f} ({low:.3f} to {high:.3f}) "
                f"| {statistics.median(following for _, following in pairs) / 1e6:.2f} ms |"
            )
    loads = [timed(lambda: runtime.load_adapter(files[0])) for _ in range(LOADS)]
    print(f"loading A: {statistics.median(loads) / 1e6:.1f} ms, opening the model: {opening * 1e3:.0f} ms")
    grown = growth(by_options(session, feeds), [a, b, None], swaps)
    print("memory in use cannot be read here" if grown is None else f"{swaps} swaps: {grown / 1e6:+.1f} MB in memory")


def token(session: Any) -> dict[str, np.ndarray]:
    """One token behind PAST others."""
    feeds: dict[str, np.ndarray] = {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, PAST + 1), np.int64)}
    random = np.random.default_rng(0)
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = (1, value.shape[1], PAST, value.shape[3])
            feeds[value.name] = random.normal(0, 0.1, shape).astype(np.float32)
    return feeds


def by_options(session: Any, feeds: dict[str, np.ndarray]) -> Step:
    def step(adapter: runtime.SwapAdapter | None) -> None:
        runtime.run(session, feeds, adapter, ["logits"])

    return step


def by_binding(session: Any, feeds: dict[str, np.ndarray]) -> Step:
    """A new binding after each swap, the old one otherwise."""
    last: list[Any] = [feeds, None]  # no adapter is this

    def step(adapter: runtime.SwapAdapter | None) -> None:
        if last[0] is not adapter:
            last[:] = adapter, runtime.bind(session, feeds, adapter, ["logits"])
        session.run_with_iobinding(last[1])
        last[1].copy_outputs_to_cpu()

    return step


def rounds_of(step: Step, adapters: list[runtime.SwapAdapter | None], rounds: int) -> list[list[tuple[float, float]]]:
    """For each adapter the times (first, next) of two runs in a row after another one's, in nanoseconds."""
    for adapter in adapters * WARM:
        step(adapter)
    times: list[list[tuple[float, float]]] = [[] for _ in adapters]
    for _ in range(rounds):
        for adapter, found in zip(adapters, times, strict=True):
            found.append((timed(lambda: step(adapter)), timed(lambda: step(adapter))))  # noqa: B023
    return times


def timed(work: Callable[[], Any]) -> float:
    start = time.thread_time_ns()
    work()
    return float(time.thread_time_ns() - start)


def growth(step: Step, adapters: list[runtime.SwapAdapter | None], swaps: int) -> int | None:
    """Bytes that the process holds more after so many swaps; None where /proc does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    held = []
    for count in (max(3, swaps // 10), swaps):  # the first to fill what fills once
        for index in range(count):
            step(adapters[index % len(adapters)])
        held.append(int(statm.read_text().split()[1]) * 4096)
    return held[1] - held[0]


if __name__ == "__main__":
    main()
