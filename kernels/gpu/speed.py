"""How fast the kernels are beside what the memory allows: the seven layers of Llama 3 8B, as JSON.

    python kernels/gpu/speed.py --library kernels/build

The floor of a call is the bytes that it has to move over the bandwidth of a large copy, measured here. Calls are
replayed from a CUDA graph, over so many different layers that none finds its blocks in the cache; what one empty call
of such a graph takes is measured too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from library import Int4, Kernels
from steps import attempt

LLAMA = {
    "q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
    "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096),
}  # fmt: skip
SMALL = {"q": (256, 256), "k": (256, 64), "v": (256, 64), "down": (896, 256)}
JOINED = {"q+k+v": ("q", "k", "v"), "gate+up": ("gate", "up")}  # layers that read the same input
Call = Callable[[], None]


def asked_for() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="to try the script itself")
    parser.add_argument("--num-blocks", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    asked = asked_for()
    kernels, device = Kernels(asked.library), asked.device
    shapes = SMALL if asked.small else LLAMA
    rows = [1, 8] if asked.small else [1, 4, 16, 512, 2048]
    spread = (1 << 20) if asked.small else (256 << 20)  # several times the largest cache
    bandwidth = copy_bandwidth(device, spread * 4)
    empty = empty_call(kernels, device)
    found: dict[str, Any] = {
        "bandwidth": bandwidth,
        "matrix_rate": matrix_rate(device, 256 if asked.small else 8192),
        "empty_call": empty,
        "branch": [],
        "int4": [],
        "dense": [],
    }
    few = [m for m in rows if m <= (16 if device == "cuda" else 1)] if kernels.takes_int4(device) else []

    def timed(kind: str, layer: str, m: int, measure: Callable[..., dict[str, float]], *of: Any) -> None:
        def do() -> None:
            taken = measure(kernels, device, *of, asked.num_blocks, spread, bandwidth)
            if kind == "branch":  # small layers are a launch and little else
                taken["ratio_without_launch"] = (taken["us"] - empty * 1e6) / taken["floor_us"]
            found[kind].append({"layer": layer, "rows": m, **taken})

        attempt(f"{kind} {layer}, {m} rows", do, found)
        print(json.dumps(found))

    for name, size in shapes.items():
        for m in rows:
            timed("branch", name, m, branch, m, *size)
    single: dict[str, tuple[str, ...]] = {name: (name,) for name in shapes}
    for name, parts in (single | JOINED).items():
        for m in few if set(parts) <= set(shapes) else []:
            timed("int4", name, m, int4, m, [shapes[part] for part in parts])
    for name, size in shapes.items() if few else []:
        timed("dense", name, 0, dense, *size)


def seconds(calls: list[Call], device: str) -> float:
    """Of one call: the median of five replays of all in a row, a few times over where they are few."""
    if device == "cpu":
        return min(timed(calls) for _ in range(3)) / len(calls)
    calls = calls * max(1, 64 // len(calls))  # what the replay itself costs counts less
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[2:]) / len(calls)


def timed(calls: list[Call]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes read and written a second."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * size / seconds([copy] * 4, device)


def matrix_rate(device: str, size: int) -> float:
    """Operations a second of a large product in bfloat16, of random numbers: zeros run faster."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in "ab")
    product = torch.empty_like(a)
    return 2 * size**3 / seconds([lambda: torch.mm(a, b, out=product)] * 4, device)


def empty_call(kernels: Kernels, device: str) -> float:
    """A launch with next to nothing to do."""
    x, y = (torch.zeros(1, 8, dtype=torch.float16, device=device) for _ in "xy")
    blocks = torch.zeros(1, 8, 8, dtype=torch.float16, device=device)
    return seconds([lambda: kernels.branch(x, blocks, y, y)] * 200, device)


def copies_for(size: int, spread: int) -> int:
    """So many that together they are `spread` bytes: fewer of a small layer would stay in the cache."""
    return max(2, min(4096, -(-spread // size)))


def result(taken: float, moved: int, bandwidth: float) -> dict[str, float]:
    return {"us": taken * 1e6, "floor_us": moved / bandwidth * 1e6, "ratio": taken * bandwidth / moved}


def branch(
    kernels: Kernels, device: str, rows: int, inputs: int, outputs: int, count: int, spread: int, bandwidth: float
) -> dict[str, float]:
    """The branch in fp16, in place."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    shape = (count, -(-inputs // count), -(-outputs // count))
    moved = 2 * (shape[0] * shape[1] * shape[2] + rows * inputs + 2 * rows * outputs)
    calls: list[Call] = []
    for _ in range(copies_for(moved, spread)):
        x, y, blocks = torch.randn(rows, inputs, **half), torch.zeros(rows, outputs, **half), torch.randn(shape, **half)
        calls.append(lambda x=x, y=y, blocks=blocks: kernels.branch(x, blocks, y, y))
    return result(seconds(calls, device), moved, bandwidth)


def layer(inputs: int, outputs: int, count: int, device: str) -> tuple[Int4, int]:
    """A layer in fp16, symmetric groups of 32, and the bytes of its weight and blocks."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    shape, groups = (count, -(-inputs // count), -(-outputs // count)), -(-inputs // 32)
    codes = torch.randint(0, 256, (outputs, groups, 16), dtype=torch.uint8, device=device)
    made = Int4(codes, torch.rand(outputs, groups, **half), None, 32, torch.randn(shape, **half))
    return made, outputs * groups * 18 + 2 * shape[0] * shape[1] * shape[2]


def int4(
    kernels: Kernels, device: str, rows: int, sizes: list[tuple[int, int]], count: int, spread: int, bandwidth: float
) -> dict[str, float]:
    """Layers of one input with their branches, in one launch."""
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    inputs = sizes[0][0]
    moved = sum(layer(*size, count, "meta")[1] for size in sizes) + 2 * rows * (inputs + sum(n for _, n in sizes))
    calls: list[Call] = []
    for _ in range(copies_for(moved, spread if device == "cuda" else 0)):
        layers = [layer(*size, count, device)[0] for size in sizes]
        x, outputs = torch.randn(rows, inputs, **half), [torch.zeros(rows, n, **half) for _, n in sizes]
        calls.append(lambda x=x, layers=layers, outputs=outputs: kernels.int4(x, layers, outputs))
    return result(seconds(calls, device), moved, bandwidth)


def dense(
    kernels: Kernels, device: str, inputs: int, outputs: int, count: int, spread: int, bandwidth: float
) -> dict[str, float]:
    """The weight and its blocks written out, which is what a prompt costs beside a product of dense matrices."""
    moved = layer(inputs, outputs, count, "meta")[1] + 2 * inputs * outputs
    calls: list[Call] = []
    for _ in range(copies_for(moved, spread if device == "cuda" else 0)):
        one = layer(inputs, outputs, count, device)[0]
        target = torch.zeros(outputs, inputs, dtype=torch.float16, device=device)
        calls.append(lambda one=one, target=target: kernels.dense(one, target))
    return result(seconds(calls, device), moved, bandwidth)


if __name__ == "__main__":
    main()
