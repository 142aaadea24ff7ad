"""The float road: every weight quantized by an algorithm, with the blocks in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import Result

from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import float_road, learned_road
from diablo_export.converters.budget import BATCH_TOKENS
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_linears import linears, numpy_of
from diablo_export.measure.parity import parity
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.layerwise import Layers
from diablo_export.trainer.model import load_base
from tests import tiny
from tests.test_cli_export import refused

Get = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to run every line."""
    for name, value in (("_LENGTH", 32), ("_JUDGED", 4), ("_FITTED", 8)):
        monkeypatch.setattr(float_road, name, value)
    monkeypatch.setattr(learned_road, "LAYER_STEPS", 40)
    monkeypatch.setattr(learned_road, "STEPS", 40)


@pytest.mark.parametrize("method", ["k_quant", "hqq", "gptq", "learned"])
def test_every_weight_is_quantized_so(method: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = merge(tiny_model("llama"), tiny_adapter("llama"), out, quantize="int4", method=method, min_survival=0.8)
    survival = manifest["survival"]
    assert (survival["method"], manifest["options"]["method"], survival["passed"]) == (method, method, True)
    by = "gptq" if method == "learned" else method
    assert survival["reference"].startswith(f"the base quantized by {by} ")
    assert {entry["algorithm"] for entry in manifest["modules"]} == {method}
    (row,) = survival["tried"]
    assert row["kl"] < 0.3 * row["base_kl"] and row["tuned_kl"] < 0.3 * row["base_kl"]  # measured 0.1 to 0.15
    assert row["modules"].keys() == {entry["name"] for entry in manifest["modules"]}
    assert survival["runtime_cosine"] > 0.998  # what was measured is the file
    layers = [layer for layer in linears(ir.load(out / "model.onnx")) if layer.bits]
    kinds = {None if layer.zero_points is None else numpy_of(layer.zero_points).dtype for layer in layers}
    assert kinds == {{"k_quant": np.dtype(np.uint8), "hqq": np.dtype(np.float32)}.get(method)}
    assert len(layers) == 15  # the head, too
    report = parity(out, limit={"adapter.survival_gain": 0.5})  # of random weights int4 loses more than of trained ones
    assert report["verdict"] == "pass", [check for check in report["checks"] if not check["pass"]]


def test_what_does_not_fit_is_learned_layer_by_layer(
    tiny_model: Get,
    tiny_adapter: Get,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(float_road, "memory_fault", lambda source, copies: f"{copies:.0f} copies are too large")
    how: Any = {"quantize": "int4", "method": "learned", "min_survival": 0.5}
    manifest = merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", **how)
    (row,) = manifest["survival"]["tried"]
    assert row["layer_steps"] == 40 and "steps" not in row
    assert "learned layer by layer, which keeps less than all layers together: 7 copies are too large" in caplog.text


def test_an_adapter_that_knows_other_weights_errors(
    tiny_model: Get,
    tiny_adapter: Get,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter = replace(Adapter.load(tiny_adapter("llama")), base_grid=BaseGrid(4, 32, True))
    monkeypatch.setattr(float_road, "_Tuned", lambda *_: 1 / 0)  # enough has been said
    with pytest.raises(ZeroDivisionError):
        arguments: Any = (tmp_path, adapter, Checkpoint.open(tiny_model("llama")), None)
        float_road.float_road(*arguments, method="k_quant")
    said = "trained beside int4 in groups of 32, symmetric weights, each rounded to the nearest, and k_quant rounds the"
    assert said in caplog.text


def test_a_batch_has_room_for_the_longest_sequence(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """Also of those that are not measured on: every third line is."""
    lines = [{"prompt": "the cat sat on the mat " * (1 if n % 3 == 0 else 4), "completion": "mat"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given: Any = (Checkpoint.open(tiny_model("llama")), Adapter.load(tiny_adapter("llama")), tmp_path / "pairs.jsonl")
    tuned = float_road._Tuned(*given, 900, 0)
    longest = [max(len(item.ids) for item in items) for items in (tuned.text.judged, tuned.text.fitted)]
    assert longest[0] < longest[1] and tuned.batch * longest[1] <= BATCH_TOKENS


def test_hidden_states_are_bounded_by_the_longest_sequence(tiny_model: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = load_base(tiny_model("llama"), "causal-lm")  # 64 wide
    items = [Encoded(np.arange(3, 3 + size, dtype=np.int32), np.ones(size, np.bool_)) for size in (2, 30, 30, 30)]
    heard: list[int] = []
    listen = Layers.listen
    monkeypatch.setattr(Layers, "listen", lambda *given: heard.append(len(given[1])) or listen(*given))
    monkeypatch.setattr(learned_road, "_HIDDEN", 2 * 30 * 64)
    learned_road._layer_by_layer(network, ["model.layers.0.mlp.up_proj"], items, steps=0, size=1, pad=0, seed=0)
    assert sum(heard) == 2


@pytest.mark.slow
def test_less_is_lost_than_by_rounding(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_road, "_FITTED", 32)
    base, text = real_data / "tinystories656k-hf", (real_data / "tinystories-text/tinystories_val.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:20_000])
    adapter = tiny.make_adapter(base, tmp_path / "adapter", num_blocks=8, scale=0.02)
    lost = {}
    for method in ("rtn", "k_quant", "hqq", "gptq"):
        merge(base, adapter, tmp_path / method, quantize="int4", method=method, min_survival=0.5)
        report = parity(tmp_path / method, data=tmp_path / "text.txt", max_tokens=2048, modules=False)
        lost[method] = report["kl"]["mean"]
    assert max(lost["k_quant"], lost["hqq"]) < lost["rtn"] and lost["gptq"] < 0.8 * lost["rtn"], lost


@pytest.mark.slow
def test_other_models(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    options: Any = {"quantize": "int4", "min_survival": 0.5}
    for architecture, method, more in (
        ("phi3", "gptq", {}),  # fused layers in parts
        ("qwen2", "hqq", {"precision": "fp16"}),  # zero points in fp16, a tied head
        ("bert", "k_quant", {}),
        ("phi3", "learned", {"asymmetric": True, "precision": "fp16"}),
    ):
        out = tmp_path / f"{architecture}-{method}"
        manifest = merge(tiny_model(architecture), tiny_adapter(architecture), out, method=method, **options, **more)
        assert manifest["survival"]["runtime_cosine"] > 0.98, out.name
        # random weights, as above; a random classifier's answers are noise altogether
        report = parity(out, limit={"adapter.survival_gain": 0.3, "top1_agreement.drop": 0.5, "kl.share": 1.0})
        failed = [check["name"] for check in report["checks"] if not check["pass"]]
        assert not failed, (out.name, failed)


def test_calibration_data_is_read(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(["the cat sat on the mat and the dog sat on the log"] * 40))
    result = run(
        "merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "--quantize", "int8", "--method", "gptq",
        "--calibration", tmp_path / "text.txt", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert str(tmp_path / "text.txt") in manifest["survival"]["text"]
    assert manifest["survival"]["tried"][0]["cosine"] > 0.99  # 8 bits


def test_what_does_not_go(run: Run, genai_graph: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", tiny_adapter("llama")
    float_model = ("merge", "-m", tiny_model("llama"), "-a", adapter, "-o", out)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*float_model, "--quantize", "int4", "--method", "hqq", "--symmetric"), "--method hqq chooses zero points"),
        ((*float_model, "--quantize", "int4", "--method", "gptq", "--plan", "auto"), "takes no --plan"),
        ((*float_model, "--method", "k_quant"), "--quantize none rounds nothing"),
        (
            ("merge", "-m", genai_graph("llama", "int4"), "-a", adapter, "-o", out, "--method", "k_quant"),
            "--method k_quant quantizes every weight of a float model, and model.onnx is what it is",
        ),
    ]
    for given, message in cases:
        assert re.search(re.escape(message), refused(run(*given), out))
