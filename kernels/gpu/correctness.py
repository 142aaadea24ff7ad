"""Whether the kernels compute the right numbers: random shapes against double, as JSON.

    python kernels/gpu/correctness.py --library kernels/build --calls 2000

Outputs are poisoned with NaN before each call, and so is what lies between rows and the cropped parts of blocks; inputs
are fresh each time, and begin at odd addresses in a quarter of the calls. A tenth of the calls is captured into a CUDA
graph and replayed on new inputs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import torch
from library import NAMES, Int4, Kernels
from steps import attempt
from torch import Tensor

PAIRS = [
    (torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.int8),
    (torch.float16, torch.float16), (torch.float16, torch.int8), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16), (torch.bfloat16, torch.int8),
]  # fmt: skip
# Of the largest output: float32 sums of up to 8192 products in another order; beyond it one rounding to y's type
SUMS, ROUNDING = 1e-5, {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIZES = [1, 2, 7, 14, 16, 32, 43, 64, 76, 86, 96, 172, 224, 344, 1024]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--no-graphs", action="store_true", help="capture nothing into CUDA graphs")
    asked = parser.parse_args()
    kernels = Kernels(asked.library)
    random.seed(asked.seed)
    torch.manual_seed(asked.seed)
    found: dict[str, Any] = {"calls": 0, "worst": {}, "worst_at": {}}
    for call in range(asked.calls):
        dtype, stored = PAIRS[call % len(PAIRS)]
        graph = call % 10 == 0 and not asked.no_graphs
        compare(found, f"{NAMES[dtype]} x {NAMES[stored]}", branch, kernels, asked.device, dtype, stored, graph)
        if kernels.takes_int4(asked.device) and call % 4 == 0:
            dtype, as_dense = (torch.float16, torch.bfloat16)[call // 4 % 2], call % 12 == 8
            compare(
                found, f"{'dense' if as_dense else 'int4'} {NAMES[dtype]}", int4, kernels, asked.device, dtype, as_dense
            )
        found["calls"] = call + 1
        if call % 100 == 99 or call + 1 == asked.calls:
            print(json.dumps(found))


def compare(found: dict[str, Any], kind: str, call: Callable[..., tuple[float, str]], *arguments: Any) -> None:
    """The worst error of a kind so far, of what is allowed, and its sizes; a kind that failed is left alone."""

    def do() -> None:
        error, where = call(*arguments)
        if error >= found["worst"].get(kind, 0.0):
            found["worst"][kind], found["worst_at"][kind] = error, where

    if found["worst"].get(kind) != inf and not attempt(kind, do, found):
        found["worst"][kind] = inf


def sizes() -> tuple[int, int, int, int, int]:
    """Number of blocks, their sizes, and how many inputs and outputs there are."""
    count = random.randint(1, 8)
    size_in, size_out = (random.choice(SIZES) if random.random() < 0.7 else random.randint(1, 300) for _ in "io")
    inputs, outputs = count * size_in, count * size_out
    if random.random() < 0.3:
        inputs, outputs = random.randint(1, inputs), random.randint(1, outputs)
    return count, size_in, size_out, inputs, outputs


def rows_of() -> int:
    return random.choice([1, 1, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 64, 65, 130, 300, 1000])


def matrix(rows: int, columns: int, dtype: torch.dtype, device: str, fill: bool = True) -> Tensor:
    """Rows at a stride of their own, from any address, NaN around them."""
    stride, skip = columns + random.choice([0, 0, 3, 8]), random.choice([0, 0, 0, 1])
    flat = torch.full((rows * stride + skip,), float("nan"), dtype=dtype, device=device)
    view = flat[skip:].view(rows, stride)[:, :columns]
    return view.normal_() if fill else view


def block_values(count: int, size_in: int, size_out: int, inputs: int, outputs: int, stored: torch.dtype, device: str,
                 ) -> Tensor:  # fmt: skip
    if stored == torch.int8:
        return torch.randint(-127, 128, (count, size_in, size_out), device=device).to(stored)
    blocks = torch.randn(count, size_in, size_out, device=device).to(stored)
    for block in range(count):
        blocks[block, max(0, inputs - block * size_in) :] = float("nan")
        blocks[block, :, max(0, outputs - block * size_out) :] = float("nan")
    return blocks


def wanted_branch(x: Tensor, blocks: Tensor, scales: Tensor | None, y0: Tensor) -> Tensor:
    y, (count, size_in, size_out) = y0.double().clone(), blocks.shape
    for block in range(count):
        i = slice(block * size_in, min((block + 1) * size_in, x.shape[1]))
        o = slice(block * size_out, min((block + 1) * size_out, y.shape[1]))
        if i.start < i.stop and o.start < o.stop:
            weights = blocks[block, : i.stop - i.start, : o.stop - o.start].double()
            y[:, o] += x[:, i].double() @ weights * (1.0 if scales is None else scales[block].double())
    return y


def error_of(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """The largest error in units of what is allowed; infinite for NaN, and where something beside `got` was written."""
    allowed = ROUNDING[dtype] * wanted.abs() + SUMS * wanted.abs().max() + 1e-30
    worst = float(((got.double() - wanted).abs() / allowed).max())
    between = torch.ones_like(whole_of(got), dtype=torch.bool)
    between.as_strided(*_place(got)).fill_(False)
    return worst if worst == worst and whole_of(got)[between].isnan().all() else inf


def whole_of(view: Tensor) -> Tensor:
    """The memory that `matrix` made it in."""
    return view if view._base is None else view._base


def _place(view: Tensor) -> tuple[Any, ...]:
    return view.shape, view.stride(), view.storage_offset()


def branch(kernels: Kernels, device: str, dtype: torch.dtype, stored: torch.dtype, graph: bool) -> tuple[float, str]:
    count, size_in, size_out, inputs, outputs = sizes()
    rows = rows_of()
    x, y0 = matrix(rows, inputs, dtype, device), matrix(rows, outputs, dtype, device)
    blocks = block_values(count, size_in, size_out, inputs, outputs, stored, device)
    scales = torch.rand(count, device=device) / 64 if stored == torch.int8 else None
    in_place = random.random() < 0.5
    y = y0 if in_place else torch.full_like(whole_of(y0), float("nan")).as_strided(*_place(y0))
    before = y0.clone()

    def call() -> None:
        kernels.branch(x, blocks, y0, y, scales)

    call()
    if graph and device == "cuda":
        replayed(call, x, y, before if in_place else torch.full_like(before, float("nan")))
    how = ", in place" * in_place + ", replayed" * (graph and device == "cuda")
    where = f"x {_shown(x)}, blocks {_shown(blocks)}, y {_shown(y)}{how}"
    return error_of(y, wanted_branch(x, blocks, scales, before), dtype), where


def _shown(value: Tensor) -> str:
    """Its sizes and strides, and where it begins."""
    return f"{tuple(value.shape)} by {tuple(value.stride())} at {value.data_ptr() % 16}"


def replayed(call: Any, x: Tensor, y: Tensor, before: Tensor) -> None:
    """The call as a replay of a graph, on an x that it was not recorded with; y as it was before."""
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    x.normal_()
    y.copy_(before)
    recorded.replay()
    torch.cuda.synchronize()


def int4(kernels: Kernels, device: str, dtype: torch.dtype, as_dense: bool) -> tuple[float, str]:
    """One to three layers of an input in one launch; or, as for prompts, the first one as a dense matrix."""
    first = sizes()
    if device == "cuda" and random.random() < 0.25:  # so many outputs that four warps share a tile
        count, size_in, size_out = random.randint(8, 12), random.choice(SIZES[:-1]), random.randint(1024, 1100)
        first = (count, size_in, size_out, count * size_in, count * size_out - random.randint(0, 30))
    group, rows, inputs = random.choice([32, 64, 128]), random.randint(1, 20), first[3]
    layers = [int4_layer(first, group, dtype, device)]
    for _ in range(random.randint(0, 2)):
        count, size_out = random.randint(1, 8), random.choice(SIZES)
        layers.append(
            int4_layer((count, -(-inputs // count), size_out, inputs, count * size_out), group, dtype, device)
        )
    stored = ", ".join(f"codes {_shown(one.codes)}, blocks {_shown(one.blocks)}" for one in layers)
    if as_dense:
        dense = torch.full((len(layers[0].codes), inputs), float("nan"), dtype=dtype, device=device)
        kernels.dense(layers[0], dense)
        eye = torch.eye(inputs, dtype=torch.float64, device=device)
        wanted = wanted_branch(eye, layers[0].blocks, None, weight_of(layers[0], inputs).double().T).T
        return error_of(dense, wanted, dtype), f"{inputs} inputs, {stored}"
    x = matrix(rows, inputs, dtype, device)
    outputs = [matrix(rows, len(layer.codes), dtype, device, fill=False) for layer in layers]
    kernels.int4(x, layers, outputs)
    errors = []
    for layer, y in zip(layers, outputs, strict=True):
        base = x.double() @ weight_of(layer, inputs).to(dtype).double().T  # as the kernel rounds it
        errors.append(error_of(y, wanted_branch(x, layer.blocks, None, base), dtype))
    return max(errors), f"x {_shown(x)}, {stored}"


def int4_layer(of: tuple[int, int, int, int, int], group: int, dtype: torch.dtype, device: str) -> Int4:
    count, size_in, size_out, inputs, outputs = of
    groups = -(-inputs // group)
    codes = torch.randint(0, 256, (outputs, groups, group // 2), dtype=torch.uint8, device=device)
    scales = (torch.randn(outputs, groups, device=device) / 10).to(dtype)
    zeros = torch.randint(0, 256, (outputs, -(-groups // 2)), dtype=torch.uint8, device=device)
    blocks = torch.randn(count, size_in, size_out, device=device).to(dtype)
    return Int4(codes, scales, zeros if random.random() < 0.5 else None, group, blocks)


def weight_of(layer: Int4, inputs: int) -> Tensor:
    """(out_features, in_features) in float32."""
    outputs, groups = layer.scales.shape
    unpacked = torch.stack([layer.codes & 15, layer.codes >> 4], -1).view(outputs, groups, layer.group_size).float()
    zeros = torch.full((outputs, -(-groups // 2)), 0x88, device=unpacked.device) if layer.zeros is None else layer.zeros
    zero = torch.stack([zeros & 15, zeros >> 4], -1).view(outputs, -1)[:, :groups, None].float()
    return ((unpacked - zero) * layer.scales[..., None].float()).view(outputs, -1)[:, :inputs]


if __name__ == "__main__":
    main()
