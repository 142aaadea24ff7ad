"""The kernels inside ONNX Runtime: whole models with adapters, and layers against the clock, as JSON.

    python kernels/gpu/sessions.py --library kernels/build --models FOLDER

FOLDER holds exports (`run.py --prepare` makes them): each is run on the CPU and on the device, with the kernel library,
without it and with fused layers, without adapter and with each of its own; and a profile says where each node ran. The
layers are MatMulNBits of Llama 3 8B's sizes in fp16, so many copies that none finds its weights in the cache: alone,
with a branch, with LoRA of as many parameters, and fused, replayed from a CUDA graph. Those that read the same input
are timed together, too, fused into one node; and one with zero points.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from speed import JOINED, LLAMA, SMALL, copies_for
from steps import attempt, in_turns

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diablo_export import opschema
from diablo_export.blockdiag import BlockShape

HALF, GROUP = TensorProto.FLOAT16, 32
# Of the largest logit: two layers in float16, some ten roundings of 2^-11 each, on the same dequantized weights
LOGITS = 0.01
LENGTHS = (1, 9, 40)  # tokens: decoding, and few and many rows of the fused layers
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
        print(json.dumps({"skipped": f"onnxruntime {ort.__version__} has no CUDA provider; onnxruntime-gpu has"}))
        return
    found: dict[str, Any] = {"onnxruntime": ort.__version__, "models": {}, "layers": []}
    shapes = SMALL if asked.small else LLAMA

    def step(name: str, do: Callable[[], None]) -> None:
        attempt(name, do, found)
        print(json.dumps(found))

    def timed(name: str, parts: tuple[str, ...], zeros: bool = False) -> None:
        sizes = [shapes[part] for part in parts]
        found["layers"] += layers(name, sizes, library, asked.device, asked.small, zeros)

    for folder in sorted(asked.models.iterdir()) if asked.models else []:
        step(folder.name, lambda of=folder: found["models"].update({of.name: model(of, library, asked.device)}))
    for name, parts in ({name: (name,) for name in shapes} | JOINED).items():
        if set(parts) <= set(shapes):
            step(name, lambda name=name, parts=parts: timed(name, parts))
    step("q, zero points", lambda: timed("q, zero points", ("q",), zeros=True))


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


def feeds(opened: Any, count: int) -> dict[str, Any]:
    """A prompt of so many tokens."""
    made: dict[str, Any] = {}
    for value in opened.get_inputs():
        if value.name == "input_ids":
            made[value.name] = (np.arange(count, dtype=np.int64)[None] * 71 + 5) % 300
        elif value.name == "position_ids":
            made[value.name] = np.arange(count, dtype=np.int64)[None]
        elif value.name.startswith("past"):
            made[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
        elif value.name == "attention_mask":
            made[value.name] = np.ones((1, count), np.int64)
    return made


def logits(opened: Any, adapter: Path | None, count: int) -> Any:
    options = ort.RunOptions()
    if adapter is not None:
        loaded = ort.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    return opened.run(["logits"], feeds(opened, count), options)[0].astype(np.float32)


def model(folder: Path, library: Path, device: str) -> dict[str, Any]:
    """Every way to run an export against the CPU without the library."""
    adapters: list[Path | None] = [None, *sorted((folder / "adapters").glob("*.onnx_adapter"))]
    plain = session(folder / "model.onnx", "cpu", None)
    prompts = [(adapter, count) for count in LENGTHS for adapter in adapters]
    wanted = [logits(plain, *prompt) for prompt in prompts]
    apart = min(float(np.abs(wanted[0] - other).max()) for other in wanted[1 : len(adapters)])
    files = {"without": (folder / "model.onnx", None), "with": (folder / "model.onnx", library)}
    if (folder / "fused.onnx").is_file():
        files["fused"] = (folder / "fused.onnx", library)
    runs = []
    for name, (file, kernels) in files.items():
        with tempfile.TemporaryDirectory() as scratch:
            opened = session(file, device, kernels, profile=Path(scratch) / "profile")
            got = [logits(opened, *prompt) for prompt in prompts]
            elsewhere = placed(Path(opened.end_profiling()), device)
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, wanted, strict=True)]
        error = float(np.max(errors))  # NaN is the largest, which Python's own max lets pass
        runs.append({
            "library": name,
            "error": error,
            "allowed": LOGITS,
            "not_on_device": elsewhere,
        })
    return {"adapters": len(adapters) - 1, "adapters_move_logits_by": apart, "runs": runs}


def placed(profile: Path, device: str) -> list[str]:
    """Kinds of nodes that ran elsewhere, but for those that only handle shapes."""
    wanted = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    nodes = [event["args"] for event in json.loads(profile.read_text()) if event.get("cat") == "Node"]
    sizes = {"Shape", "Size", "Mul", "Sub", "ReduceProd", "Equal"}
    shapes = sizes | {"Gather", "Unsqueeze", "Concat", "Squeeze", "Constant", "Cast"}
    ran = {n["op_name"] for n in nodes if n.get("provider") and n["provider"] != wanted and n.get("op_name")}
    return sorted(ran - shapes)


class Stack:
    """`copies` layers side by side, or families of layers with an input in common, each with weights of its own."""

    def __init__(self, kind: str, sizes: list[tuple[int, int]], num_blocks: int, zeros: bool) -> None:
        self.kind, self.inputs, self.outputs = kind, sizes[0][0], [n for _, n in sizes]
        self.num_blocks, self.zeros = num_blocks, zeros
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def model(self, copies: int, rounds: int) -> bytes:
        """All copies one after the other, and that so many times, on an input X, X1, … of each round."""
        value, results = helper.make_tensor_value_info, []
        for i in range(copies):
            outputs = [f"Y{i}_{j}" for j in range(len(self.outputs))]
            results += [value(y, HALF, ["m", n]) for y, n in zip(outputs, self.outputs, strict=True)]
            if self.kind == "fused":
                self._fused(outputs)
            else:
                for y, n in zip(outputs, self.outputs, strict=True):
                    self._apart(y, n)
        once, stored = list(self.nodes), {tensor.name for tensor in self.tensors}
        of_copies = list(results)
        for turn in range(1, rounds):
            for node in once:
                again = onnx.NodeProto()
                again.CopyFrom(node)
                again.input[:] = [name if name in stored else f"{name}{turn}" for name in node.input]
                again.output[:] = [f"{name}{turn}" for name in node.output]
                self.nodes.append(again)
            results += [value(f"{one.name}{turn}", HALF, ["m", _columns(one)]) for one in of_copies]
        inputs = [value(f"X{turn or ''}", HALF, ["m", self.inputs]) for turn in range(rounds)]
        graph = helper.make_graph(self.nodes, "layers", inputs, results, self.tensors)
        imports = [helper.make_opsetid(d, v) for d, v in (("", 18), ("com.microsoft", 1), (opschema.DOMAIN, 1))]
        functions = [opschema.function(), opschema.fused_function(18, self.zeros, len(self.outputs))]
        made = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
        onnx.checker.check_model(made)
        return bytes(made.SerializeToString())

    def _stored(self, values: Any) -> str:
        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def _half(self, *size: int) -> str:
        return self._stored((self.random.standard_normal(size, np.float32) / 100).astype(np.float16))

    def _bytes(self, *size: int) -> str:
        return self._stored(self.random.integers(0, 256, size, np.uint8))

    def _weight(self, n: int) -> tuple[list[str], list[str]]:
        """Codes and scales; zero points or none."""
        groups = -(-self.inputs // GROUP)
        given = [self._bytes(n, groups, GROUP // 2), self._half(n, groups)]
        return given, [self._bytes(n, -(-groups // 2))] if self.zeros else []

    def _blocks(self, n: int) -> str:
        return self._half(*BlockShape.for_linear(self.inputs, n, self.num_blocks).blocks)

    def _fused(self, outputs: list[str]) -> None:
        count, own, zeros = len(outputs), [], []
        for n in self.outputs:
            weight, zero_points = self._weight(n)
            own += [*weight, self._blocks(n)]
            zeros += zero_points
        numbers = [self.inputs, *self.outputs, 4, GROUP, 0]
        attributes = dict(zip(opschema.fused_attributes(count), numbers, strict=True))
        name = opschema.NAMES_FUSED[count]
        self.nodes.append(helper.make_node(name, ["X", *own, *zeros], outputs, domain=opschema.DOMAIN, **attributes))

    def _apart(self, y: str, n: int) -> None:
        first = y if self.kind == "base" else f"base_{y}"
        weight, zeros = self._weight(n)
        numbers = {"K": self.inputs, "N": n, "bits": 4, "block_size": GROUP}
        given = ["X", *weight, *zeros]
        self.nodes.append(helper.make_node("MatMulNBits", given, [first], domain="com.microsoft", **numbers))
        if self.kind == "branch":
            given = ["X", self._blocks(n), first]
            self.nodes.append(helper.make_node(opschema.NAME, given, [y], domain=opschema.DOMAIN))
        if self.kind == "lora":
            rank = max(1, round(self.inputs * n / self.num_blocks / (self.inputs + n)))
            self.nodes.append(helper.make_node("MatMul", ["X", self._half(self.inputs, rank)], [f"low_{y}"]))
            self.nodes.append(helper.make_node("MatMul", [f"low_{y}", self._half(rank, n)], [f"delta_{y}"]))
            self.nodes.append(helper.make_node("Add", [first, f"delta_{y}"], [y]))


def _columns(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.shape.dim[1].dim_value


def layers(
    name: str, sizes: list[tuple[int, int]], library: Path, device: str, small: bool, zeros: bool = False
) -> list[dict[str, Any]]:
    """Times of layers with an input in common, by rows and kind, in turns; `ratio` is over MatMulNBits alone."""
    copies = 2 if small else copies_for(sum(i * o for i, o in sizes) * 9 // 16, 128 << 20)
    rounds = 2 if small else 16  # what a run costs beside its layers counts less
    models = {kind: Stack(kind, sizes, 4 if small else 64, zeros).model(copies, rounds) for kind in KINDS}
    opened = {kind: session(models.pop(kind), device, library, device == "cuda") for kind in KINDS}
    found = []
    for turn, m in enumerate([1, 8] if small else [1, 512, 2048]):
        clocks = bound(opened, m, sizes[0][0], [n for _, n in sizes] * copies, device, turn)
        *_, times = in_turns(clocks, 5 if device == "cpu" else 22 if m == 1 else 11)
        taken = {
            kind: values[2:] for kind, values in times.items()
        }  # the first run is plain, the second one is recorded
        per_layer = {f"{kind}_us": statistics.median(taken[kind]) * 1e6 / copies / rounds for kind in KINDS}
        ratio = {kind: statistics.median(map(truediv, taken[kind], taken["base"])) for kind in KINDS[1:]}
        found.append({"layer": name, "rows": m, "copies": copies, **per_layer, "ratio": ratio})
    return found


def bound(
    opened: dict[str, Any], rows: int, inputs: int, outputs: list[int], device: str, graph_id: int
) -> dict[str, Callable[[], float]]:
    """A run of each with everything on the device; all runs and rounds write to the same memory."""
    x = np.random.default_rng(0).standard_normal((rows, inputs), np.float32).astype(np.float16)
    given = ort.OrtValue.ortvalue_from_numpy(x, device, 0)
    written = [ort.OrtValue.ortvalue_from_shape_and_type([rows, n], np.float16, device, 0) for n in outputs]
    options = ort.RunOptions()
    if device == "cuda":
        options.add_run_config_entry("gpu_graph_id", str(graph_id + 1))

    def clock_of(one: Any) -> Callable[[], float]:
        binding = one.io_binding()
        for value in one.get_inputs():
            binding.bind_ortvalue_input(value.name, given)
        for i, value in enumerate(one.get_outputs()):
            binding.bind_ortvalue_output(value.name, written[i % len(written)])

        def clock() -> float:
            began = time.perf_counter()
            one.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
            return time.perf_counter() - began

        return clock

    return {kind: clock_of(one) for kind, one in opened.items()}


if __name__ == "__main__":
    main()
