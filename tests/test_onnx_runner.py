from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.errors import ExportError
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.torch_runner import TorchRunner
from diablo_export.trainer.model import load_tuned
from tests import exports

Get = Callable[[str], Path]
IDS = np.array([5, 17, 254, 3, 90, 41, 7, 200, 11], np.int64)
CLOSE = 1e-4  # the project's limit between torch and onnxruntime in float32, on logits of order 10


# onnxruntime-genai's graph, and torch's
@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def pair(
    request: pytest.FixtureRequest, tiny_model: Get, tiny_adapter: Get, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TorchRunner, OnnxRunner]:
    name: str = request.param
    out = exports.merged(tiny_model(name), tiny_adapter(name), tmp_path_factory.mktemp(name) / "out")
    model, _ = load_tuned(tiny_model(name), Adapter.load(tiny_adapter(name)))
    return TorchRunner(model), OnnxRunner(runtime.session(out / "model.onnx"), cache_shape=cache_shape(out))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_prefill_is_torch_s(pair: tuple[TorchRunner, OnnxRunner], length: int) -> None:
    torch_runner, onnx_runner = pair
    found = onnx_runner.prefill(IDS[:length])
    assert found.shape == (length, 320) and found.dtype == np.float32
    np.testing.assert_allclose(found, torch_runner.prefill(IDS[:length]), atol=CLOSE)


@pytest.mark.parametrize("prompt", [1, 4])
def test_decoding_is_torch_s(pair: tuple[TorchRunner, OnnxRunner], prompt: int) -> None:
    torch_runner, onnx_runner = pair
    assert onnx_runner.has_cache
    found = onnx_runner.decode(IDS[:prompt], IDS[prompt:])
    assert found.shape == (len(IDS) - prompt, 320)
    np.testing.assert_allclose(found, torch_runner.decode(IDS[:prompt], IDS[prompt:]), atol=CLOSE)
    np.testing.assert_allclose(found, onnx_runner.prefill(IDS[:-1])[prompt - 1 :], atol=CLOSE)


def test_half_precision_caches_are_fed_as_such(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", precision="fp16")
    runner = OnnxRunner(runtime.session(out / "model.onnx"), cache_shape=cache_shape(out))
    found = runner.decode(IDS[:4], IDS[4:])
    assert found.dtype == np.float32
    model, _ = load_tuned(tiny_model("llama"), Adapter.load(tiny_adapter("llama")))
    # float16 has 11 bits: a rounding is 0.004 on logits of order 10, and some dozen follow each other
    np.testing.assert_allclose(found, TorchRunner(model).decode(IDS[:4], IDS[4:]), atol=0.1)


def tiny_graph(inputs: str, path: Path) -> OnnxRunner:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    graph ({inputs}) => (float[b, t, 2] logits) {{
        one = Constant <value_ints: ints = [-1]> ()
        x = Unsqueeze (input_ids, one)
        y = Cast <to: int = 1> (x)
        logits = Concat <axis: int = -1> (y, y)
    }}"""
    model = onnx.parser.parse_model(text)
    for value in model.graph.input:
        value.name = value.name.replace("_dot_", ".")  # the text format has no dots in names
    onnx.save(model, path)
    return OnnxRunner(runtime.session(path))


def test_inputs_that_nobody_knows_are_named(tmp_path: Path) -> None:
    runner = tiny_graph("int64[b, t] input_ids, float[b, 80, f] mel, int64[b] speaker", tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"wants inputs that are not known here: mel, speaker; known are input_ids"):
        runner.prefill(IDS)


def test_token_types_and_narrow_integers_are_fed(tmp_path: Path) -> None:
    runner = tiny_graph("int32[b, t] input_ids, int64[b, t] token_type_ids", tmp_path / "m.onnx")
    np.testing.assert_array_equal(runner.prefill(IDS)[:, 0], IDS)
    assert not runner.has_cache


def test_a_cache_of_unknown_size_is_named(tmp_path: Path) -> None:
    inputs = "int64[b, t] input_ids, float[b, 2, p, h] past_key_values_dot_0_dot_key"
    runner = tiny_graph(inputs, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"past_key_values\.0\.key has shape .* config\.json does not give its sizes"):
        runner.prefill(IDS)


@pytest.mark.parametrize(
    ("file", "config", "expected"),
    [
        ("config.json", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}, (2, 16)),
        ("config.json", {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, (4, 32)),
        ("config.json", {"n_embd": 64, "n_head": 4}, (4, 16)),
        ("config.json", {"model_type": "strange"}, None),
        ("genai_config.json", {"model": {"decoder": {"head_size": 16, "num_key_value_heads": 2}}}, (2, 16)),
        ("nothing.json", {}, None),
    ],
)
def test_cache_shape(file: str, config: dict[str, Any], expected: tuple[int, int] | None, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(config))
    assert cache_shape(tmp_path) == expected


def test_length_and_output_are_read_from_the_graph(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        made (int64[1, 6] input_ids) => (float[1, 6, 2] scores) {
            axes = Constant <value = int64[1] {-1}> ()
            column = Unsqueeze (input_ids, axes)
            numbers = Cast <to = 1> (column)
            scores = Concat <axis = -1> (numbers, numbers)
        }
    """)
    onnx.save(model, tmp_path / "model.onnx")
    runner = OnnxRunner(runtime.session(tmp_path / "model.onnx"))
    assert (runner.output, runner.length, runner.decodes) == ("scores", 6, False)
    assert runner.prefill(np.array([3, 4, 5])).tolist() == [[3, 3], [4, 4], [5, 5]]
    with pytest.raises(ExportError, match="takes sequences of 6 tokens, and here are 7; export it with a free length"):
        runner.prefill(np.arange(7))
