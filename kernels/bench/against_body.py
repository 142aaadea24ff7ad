"""Times the kernel library against the operator's own function body, both in the ONNX Runtime that is installed.

    python kernels/bench/against_body.py --threads 1 --model llama-3-8b --rows 1 16 256

One node, X and the Y0 that a cheap node before it has just written (so that it may be overwritten, as behind a MatMul).
The two sessions take turns, run by run, and the ratio is the median of the ratios of neighbouring runs: what else the
machine does hits both. Below 1 the kernel is faster. "fastest" is the ratio of the fastest runs, with the nodes around:
what to look at on a busy machine with more than one thread, where a run waits for the thread that was interrupted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from diablo_export import opschema, runtime
from diablo_export.blockdiag import BlockShape

LAYERS = {
    "llama-3-8b": {"q": (4096, 4096), "k": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096)},
    "qwen2.5-0.5b": {"q": (896, 896), "k": (896, 128), "gate": (896, 4864), "down": (4864, 896)},
}
TYPES = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}


def model(k: int, n: int, element: int) -> bytes:
    """Y = BlockDiagMatMul(X, D, Y1 + 0): the sum makes Y0 a tensor of the graph's own."""
    value = helper.make_tensor_value_info
    inputs = [value("X", element, ["m", k]), value("D", element, ["b", "i", "o"]), value("Y1", element, ["m", n])]
    zero = helper.make_tensor("zero", element, [1], [0])
    nodes = [
        helper.make_node("Add", ["Y1", "zero"], ["Y0"]),
        helper.make_node(opschema.NAME, list(opschema.INPUTS), ["Y2"], domain=opschema.DOMAIN),
        helper.make_node(
            "Slice", ["Y2", "start", "stop", "axis"], ["Y"]
        ),  # so that Y0 may be overwritten: not an output
    ]
    places = [
        helper.make_tensor(name, TensorProto.INT64, [1], [at]) for name, at in (("start", 0), ("stop", 1), ("axis", 1))
    ]
    graph = helper.make_graph(nodes, "g", inputs, [value("Y", element, ["m", 1])], [zero, *places])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(opschema.DOMAIN, opschema.VERSION)]
    made = helper.make_model(graph, functions=[opschema.function()], opset_imports=imports, ir_version=8)
    return bytes(made.SerializeToString())


def session(data: bytes, threads: int, library: bool) -> Any:
    """A session with or without the kernels, its idle threads not spinning: two of them share the machine."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library:
        runtime.register(options)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def bound(opened: Any, feeds: dict[str, np.ndarray]) -> Any:
    """Inputs and output bound once, so that Python's copies are in neither time."""
    binding = opened.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    binding.bind_output("Y")
    return binding


def seconds(opened: Any, binding: Any, repeats: int) -> float:
    """Mean time of one of `repeats` runs in a row; on one thread its own, whatever else the machine does."""
    alone = opened.get_session_options().intra_op_num_threads == 1
    clock = time.thread_time if alone else time.perf_counter
    start = clock()
    for _ in range(repeats):
        opened.run_with_iobinding(binding)
    return (clock() - start) / repeats


def compare(
    rows: int, k: int, n: int, num_blocks: int, threads: int, precision: str, budget: float
) -> tuple[float, ...]:
    """Kernel seconds, body seconds, their ratio, without the nodes around; ratio of the fastest runs, with them."""
    element, dtype = TYPES[precision]
    random = np.random.default_rng(0)
    shape = BlockShape.for_linear(k, n, num_blocks)
    x, y = (random.standard_normal((rows, size), np.float32).astype(dtype) for size in (k, n))
    blocks = random.standard_normal(shape.blocks, np.float32).astype(dtype)
    data = model(k, n, element)
    # The last has no adapter: what the nodes around take is in all three
    runs = [
        (session(data, threads, library), d)
        for library, d in ((True, blocks), (False, blocks), (True, np.zeros((0, 0, 0), dtype)))
    ]
    bindings = [(opened, bound(opened, {"X": x, "D": d, "Y1": y})) for opened, d in runs]
    once = max(seconds(*pair, 2) for pair in bindings)
    repeats, times = max(1, int(0.002 / once)), []
    end = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        times.append([seconds(*pair, repeats) for pair in bindings])
    net = [(a - c, b - c) for a, b, c in times]
    return (
        statistics.median(a for a, _ in net),
        statistics.median(b for _, b in net),
        statistics.median(a / b for a, b in net),
        min(a for a, _, _ in times) / min(b for _, b, _ in times),
    )


def main() -> None:
    """Prints a line for each case as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*LAYERS], nargs="*", default=[*LAYERS])
    parser.add_argument("--layers", nargs="*", help="such as q k gate down; all when absent")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 128, 512])
    parser.add_argument("--num-blocks", type=int, nargs="*", default=[4, 16, 64, 128])
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--precision", choices=[*TYPES], nargs="*", default=["fp32"])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    asked = parser.parse_args()
    if runtime.find_library() is None:
        parser.error(runtime.LIBRARY_HELP)
    print("model         layer  type  thr    M    N   kernel us     body us  ratio   fastest")
    for name in asked.model:
        for layer, (k, n) in LAYERS[name].items():
            if asked.layers and layer not in asked.layers:
                continue
            for precision in asked.precision:
                for threads in asked.threads:
                    for num_blocks in asked.num_blocks:
                        for rows in asked.rows:
                            got = compare(rows, k, n, num_blocks, threads, precision, asked.seconds)
                            print(
                                f"{name:13} {layer:6} {precision:5} {threads:3} {rows:4} {num_blocks:4} "
                                f"{got[0] * 1e6:11.1f} {got[1] * 1e6:11.1f} {got[2]:6.2f} {got[3]:9.2f}",
                                flush=True,
                            )


if __name__ == "__main__":
    main()
