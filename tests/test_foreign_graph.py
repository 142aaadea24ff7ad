from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from diablo_export.errors import ExportError, InputError
from diablo_export.measure.foreign_graph import Graph, find, read


def saved(file: Path, text: str, **weights: np.ndarray) -> Path:  # type: ignore[type-arg]
    model = parse_model(f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save(model, file)
    return file


MATMUL = "g (int64[{shape}] input_ids, float[1, t, 8] x) => (float[1, t, 4] y) {{ y = MatMul(x, w) }}"


def test_precision_is_that_of_the_weights_that_are_multiplied(tmp_path: Path, genai_graph: Callable[..., Path]) -> None:
    w = np.zeros((8, 4), np.float32)
    assert read(saved(tmp_path / "a.onnx", MATMUL.format(shape="1, t"), w=w)).precision == "fp32"
    assert read(saved(tmp_path / "b.onnx", MATMUL.format(shape="1, t"), w=w.astype(np.float16))).precision == "fp16"
    qdq = "g (float[1, t, 8] x) => (float[1, t, 4] y) { f = DequantizeLinear(w, s)\n y = MatMul(x, f) }"
    scale = np.ones((), np.float32)
    assert read(saved(tmp_path / "c.onnx", qdq, w=w.astype(np.int8), s=scale)).precision == "int8"
    cast = "g (float[1, t, 8] x) => (float[1, t, 4] y) { f = Transpose(w)\n y = MatMul(x, f) }"
    assert read(saved(tmp_path / "d.onnx", cast, w=w.T.astype(np.float16))).precision == "fp16"
    assert read(genai_graph("llama", "int4")).precision == "int4"
    assert read(genai_graph("llama", "fp32")).precision == "fp32"


def test_what_it_takes_and_gives(tmp_path: Path, genai_graph: Callable[..., Path]) -> None:
    w = np.zeros((8, 4), np.float32)
    fixed = read(saved(tmp_path / "fixed.onnx", MATMUL.format(shape="1, 16"), w=w))
    assert (fixed.length, fixed.outputs, fixed.data) == (16, {"y": 4}, [])
    assert fixed.logits(4) == "y"
    built = read(genai_graph("llama", "fp32"))
    assert (built.length, built.outputs) == (None, {"logits": 320})  # no KV cache
    assert built.data == [genai_graph("llama", "fp32").parent / "model.onnx.data"]
    with pytest.raises(InputError, match=r"input_ids has shape \[4, 16\]; parity runs one sequence at a time"):
        read(saved(tmp_path / "batch.onnx", MATMUL.format(shape="4, 16"), w=w))


def test_the_logits_are_found_by_name_then_alone_then_by_size() -> None:
    file = Path("m.onnx")
    assert Graph(file, [], "fp32", {"hidden": 64, "logits": None}, None).logits(320) == "logits"
    assert Graph(file, [], "fp32", {"hidden": 64, "scores": 320}, None).logits(320) == "scores"
    with pytest.raises(ExportError, match=r"no output is named logits, and 2 of its outputs \(a, b\)"):
        Graph(file, [], "fp32", {"a": 320, "b": 320}, None).logits(320)


def test_the_file_is_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no ONNX file; give one file"):
        find(tmp_path)
    (tmp_path / "onnx").mkdir()
    only = tmp_path / "onnx" / "decoder.onnx"
    only.touch()
    assert find(tmp_path) == only and find(only) == only
    (tmp_path / "model.onnx").touch()
    assert find(tmp_path) == tmp_path / "model.onnx"
