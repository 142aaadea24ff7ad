"""The kernels inside ONNX Runtime: whole models with adapters, and layers against the clock, as JSON.

    python kernels/gpu/sessions.py --library kernels/build --models FOLDER

FOLDER holds exports (`run.py --prepare` makes them): each is run on the CPU and on the device, with the kernel library,
without it and with fused layers, without adapter and with each of its own; and a profile says where each node ran. The
layers are MatMulNBits of Llama 3 8B's sizes in fp16, so many copies that none finds its weights in the cache: alone,
with a branch, with LoRA of as many parameters, and fused, replayed from a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from speed import LLAMA, SMALL, copies_for

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diablo_export import opschema
from diablo_export.blockdiag import BlockShape

HALF, GROUP = TensorProto.FLOAT16, 32
# Of the largest logit: two layers in float16, some ten roundings of 2^-11 each, on the same dequantized weights
LOGITS = 0.01
KINDS = ("base", "branch", "lora", "fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="folder of libdiablo_kernels_ort.so")
    parser.add_argument("--models", type=Path, help="folder of exported folders")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="to try the script itself")
    asked = parser.parse_args()
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from their packages, or from torch's
    library = asked.library / "libdiablo_kernels_ort.so"
    if asked.device == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        print(json.dumps({"skipped": f"onnxruntime {ort.__version__} has no CUDA provider; install onnxruntime-gpu"}))
        return
    found: dict[str, Any] = {"onnxruntime": ort.__version__, "models": {}, "layers": []}
    for folder in sorted(asked.models.iterdir()) if asked.models else []:
        found["models"][folder.name] = model(folder, library, asked.device)
    for name, sizes in (SMALL if asked.small else LLAMA).items():
        found["layers"] += layers(name, *sizes, library, asked.device, asked.small)
    found["held"] = all(run["held"] for one in found["models"].values() for run in one["runs"])
    print(json.dumps(found))


def session(
    model: bytes | Path, device: str, library: Path | None, graph: bool = False, profile: Path | None = None
) -> Any:
    """A session that may use nothing but this device's provider and the CPU's."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        choices = {"use_tf32": "0", **({"enable_cuda_graph": "1"} if graph else {})}
        providers.insert(0, ("CUDAExecutionProvider", choices))
    opened = ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=providers)
    if device == "cuda" and "CUDAExecutionProvider" not in opened.get_providers():
        raise RuntimeError("onnxruntime could not load its CUDA provider: CUDA 13 and cuDNN 9 must be found")
    return opened


def feeds(opened: Any) -> dict[str, Any]:
    """A prompt of nine tokens."""
    made: dict[str, Any] = {}
    for value in opened.get_inputs():
        if value.name == "input_ids":
            made[value.name] = np.array([[5, 17, 254, 3, 90, 41, 7, 200, 11]], np.int64)
        elif value.name == "position_ids":
            made[value.name] = np.arange(9, dtype=np.int64)[None]
        elif value.name.startswith("past"):
            made[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
        elif value.name == "attention_mask":
            made[value.name] = np.ones((1, 9), np.int64)
    return made


def logits(opened: Any, adapter: Path | None) -> Any:
    options = ort.RunOptions()
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    return opened.run(["logits"], feeds(opened), options)[0].astype(np.float32)


def model(folder: Path, library: Path, device: str) -> dict[str, Any]:
    """Every way to run an export against the CPU without the library."""
    adapters: list[Path | None] = [None, *sorted((folder / "adapters").glob("*.onnx_adapter"))]
    plain = session(folder / "model.onnx", "cpu", None)
    wanted = [logits(plain, adapter) for adapter in adapters]
    apart = min(float(np.abs(wanted[0] - other).max()) for other in wanted[1:])  # adapters that do nothing show nothing
    files = {"without": (folder / "model.onnx", None), "with": (folder / "model.onnx", library)}
    if (folder / "fused.onnx").is_file():
        files["fused"] = (folder / "fused.onnx", library)
    runs = []
    for name, (file, kernels) in files.items():
        with tempfile.TemporaryDirectory() as scratch:
            opened = session(file, device, kernels, profile=Path(scratch) / "profile")
            got = [logits(opened, adapter) for adapter in adapters]
            elsewhere = placed(Path(opened.end_profiling()), device)
        error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, wanted, strict=True))
        held = error <= LOGITS and not (device == "cuda" and kernels is not None and elsewhere)
        runs.append({"library": name, "error": error, "not_on_device": elsewhere, "held": held and apart > 0})
    return {"adapters": len(adapters) - 1, "adapters_move_logits_by": apart, "runs": runs}


def placed(profile: Path, device: str) -> list[str]:
    """Kinds of nodes that ran elsewhere, but for those that only handle shapes."""
    wanted = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    nodes = [event["args"] for event in json.loads(profile.read_text()) if event.get("cat") == "Node"]
    shapes = {"Shape", "Gather", "Unsqueeze", "Concat", "Squeeze", "Constant", "Size", "Mul", "Sub", "Equal", "Cast"}
    ran = {n["op_name"] for n in nodes if n.get("provider") and n["provider"] != wanted and n.get("op_name")}
    return sorted(ran - shapes)


def stacked(kind: str, inputs: int, outputs: int, copies: int, num_blocks: int) -> bytes:
    """`copies` layers side by side, each with weights of its own."""
    random, value = np.random.default_rng(0), helper.make_tensor_value_info
    groups, shape = -(-inputs // GROUP), BlockShape.for_linear(inputs, outputs, num_blocks).blocks
    rank = max(1, round(inputs * outputs / num_blocks / (inputs + outputs)))
    nodes, tensors, results = [], [], []
    numbers = {"K": inputs, "N": outputs, "bits": 4, "block_size": GROUP}

    def stored(name: str, values: Any) -> str:
        tensors.append(numpy_helper.from_array(values, name))
        return name

    def half(name: str, *size: int) -> str:
        return stored(name, (random.standard_normal(size, np.float32) / 100).astype(np.float16))

    for i in range(copies):
        codes = stored(f"B{i}", random.integers(0, 256, (outputs, groups, GROUP // 2), np.uint8))
        given = ["X", codes, half(f"s{i}", outputs, groups)]
        y = f"Y{i}"
        first = y if kind == "base" else f"base{i}"
        if kind == "fused":
            node = helper.make_node(opschema.NAME_FUSED, [*given, half(f"D{i}", *shape)], [y], domain=opschema.DOMAIN)
            attributes = {**numbers, "accuracy_level": 0}
            node.attribute.extend(helper.make_attribute(name, number) for name, number in attributes.items())
            nodes.append(node)
        else:
            nodes.append(helper.make_node("MatMulNBits", given, [first], domain="com.microsoft", **numbers))
        if kind == "branch":
            given = ["X", half(f"D{i}", *shape), first]
            nodes.append(helper.make_node(opschema.NAME, given, [y], domain=opschema.DOMAIN))
        if kind == "lora":
            nodes.append(helper.make_node("MatMul", ["X", half(f"A{i}", inputs, rank)], [f"low{i}"]))
            nodes.append(helper.make_node("MatMul", [f"low{i}", half(f"U{i}", rank, outputs)], [f"delta{i}"]))
            nodes.append(helper.make_node("Add", [first, f"delta{i}"], [y]))
        results.append(value(y, HALF, ["m", outputs]))
    graph = helper.make_graph(nodes, "layers", [value("X", HALF, ["m", inputs])], results, tensors)
    imports = [helper.make_opsetid(d, v) for d, v in (("", 18), ("com.microsoft", 1), (opschema.DOMAIN, 1))]
    functions = [opschema.function(), opschema.fused_function()]
    made = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def layers(name: str, inputs: int, outputs: int, library: Path, device: str, small: bool) -> list[dict[str, Any]]:
    """Times of one layer, by rows and kind; `ratio` is over MatMulNBits alone."""
    copies = 2 if small else copies_for(inputs * outputs * 9 // 16, 128 << 20)
    rows = [1, 8] if small else [1, 512, 2048]
    found = {m: {"layer": name, "rows": m, "copies": copies} for m in rows}
    for kind in KINDS:
        opened = session(stacked(kind, inputs, outputs, copies, 4 if small else 64), device, library, device == "cuda")
        for turn, m in enumerate(rows):
            taken = seconds(opened, m, inputs, outputs, copies, device, turn) / copies
            found[m][f"{kind}_us"] = taken * 1e6
    for one in found.values():
        one["ratio"] = {kind: one[f"{kind}_us"] / one["base_us"] for kind in KINDS[1:]}
    return list(found.values())


def seconds(opened: Any, rows: int, inputs: int, outputs: int, copies: int, device: str, graph_id: int) -> float:
    """Of one run with everything on the device, the median of many."""
    binding, options = opened.io_binding(), ort.RunOptions()
    if device == "cuda":
        options.add_run_config_entry("gpu_graph_id", str(graph_id + 1))
    x = np.random.default_rng(0).standard_normal((rows, inputs), np.float32).astype(np.float16)
    kept = [ort.OrtValue.ortvalue_from_numpy(x, device, 0)]  # addresses that a graph may keep
    binding.bind_ortvalue_input("X", kept[0])
    for i in range(copies):
        kept.append(ort.OrtValue.ortvalue_from_shape_and_type([rows, outputs], np.float16, device, 0))
        binding.bind_ortvalue_output(f"Y{i}", kept[-1])
    times = []
    for _ in range(5 if device == "cpu" else 30):
        began = time.perf_counter()
        opened.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
