"""Read what an ONNX model of another program takes, gives and is written in, from the graph alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from diablo_export.errors import ExportError, InputError

_CACHE = re.compile(r"^(past|present)")
_FLOATS = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
_BITS = {
    onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT8: 8,
}  # fmt: skip
_INT8_OPERATORS = ("MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm")


@dataclass(frozen=True)
class Graph:
    """One ONNX model.

    Attributes:
        file: where it lies.
        data: its external data files.
        precision: fp32, fp16, bf16, int8 or int4: the smallest that a linear layer's weights are written in.
        outputs: name → last size of each output that is no KV cache; None where that is open.
        length: tokens that each sequence must have; None: any.
    """

    file: Path
    data: list[Path]
    precision: str
    outputs: dict[str, int | None]
    length: int | None

    def logits(self, classes: int) -> str:
        """The output that holds the logits of so many classes: by its name, else as the only one, else by its size.

        Raises:
            ExportError: none, or more than one that could be.
        """
        if "logits" in self.outputs or len(self.outputs) == 1:
            return "logits" if "logits" in self.outputs else next(iter(self.outputs))
        fitting = [name for name, size in self.outputs.items() if size == classes]
        if len(fitting) != 1:
            raise ExportError(
                f"{self.file}: no output is named logits, and {len(fitting)} of its outputs "
                f"({', '.join(self.outputs)}) have the model's {classes} classes; name the one with the logits so"
            )
        return fitting[0]


def find(out: Path) -> Path:
    """The ONNX file that `out` is or holds: model.onnx at the top, else the only one anywhere in it.

    Raises:
        InputError: none, or several.
    """
    if out.is_file():
        return out
    if (out / "model.onnx").is_file():
        return out / "model.onnx"
    found = sorted(out.rglob("*.onnx"))
    if len(found) == 1:
        return found[0]
    shown = ", ".join(path.relative_to(out).as_posix() for path in found[:8])
    raise InputError(f"{out}: holds {f'{len(found)} ONNX files, {shown}' if found else 'no ONNX file'}; give one file")


def read(file: Path) -> Graph:
    """Read a model's graph, not its weights.

    Raises:
        InputError: no ONNX model, or one that takes only batches.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        raise InputError(f"{file}: cannot be read as ONNX ({type(error).__name__}); copy or export it again") from error
    inputs = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    rows, length = (inputs.get("input_ids") or [0, 0])[:2]
    if rows > 1:
        raise InputError(
            f"{file}: input_ids has shape [{rows}, {length or '…'}]; parity runs one sequence at a time, so export it "
            "with one row or with a free number of them"
        )
    outputs = {
        value.name: (list(value.type.tensor_type.shape.dim) or [None])[-1]
        for value in model.graph.output
        if not _CACHE.match(value.name)
    }
    sizes = {name: (dim.dim_value or None) if dim is not None else None for name, dim in outputs.items()}
    return Graph(file, _data(file, model), _precision(model), sizes, length or None)


def _precision(model: onnx.ModelProto) -> str:
    """The lowest of what weights are multiplied in; embeddings, norms and biases do not count."""
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    bits, floats = set(), set()
    nodes = list(_nodes(model))
    made = {node.output[0]: node for node in nodes if node.op_type in ("Transpose", "Cast", "Identity", "Constant")}
    for node in nodes:
        if node.op_type == "MatMulNBits":
            bits.add(next((entry.i for entry in node.attribute if entry.name == "bits"), 4))
        elif node.op_type == "MatMulBnb4":
            bits.add(4)
        elif node.op_type in _INT8_OPERATORS:
            bits.add(8)
        elif node.op_type == "DequantizeLinear" and stored.get(node.input[0]) in _BITS:
            bits.add(_BITS[stored[node.input[0]]])
        elif node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
            weight = node.input[1]
            while weight in made and made[weight].input:
                weight = made[weight].input[0]
            floats.add(_FLOATS.get(stored.get(weight, 0), "fp32"))
    if bits:
        return "int4" if min(bits) <= 4 else "int8"
    return next((kind for kind in ("bf16", "fp16") if kind in floats), "fp32")


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _data(file: Path, model: onnx.ModelProto) -> list[Path]:
    named = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [file.parent / name for name in sorted(named)]
