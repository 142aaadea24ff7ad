"""`quantize`: a float model as a GPTQ base, codes calibrated; trained on, exported and merged with the very codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from onnx import numpy_helper
from safetensors.numpy import load_file

from diablo_export import quantize
from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.export import export
from diablo_export.errors import CheckpointError, InputError
from diablo_export.packed import fresh
from diablo_export.packed.modules import all_stored, stored
from diablo_export.quantization import dequantize
from diablo_export.quantization import quantize as nearest
from diablo_export.trainer.model import load_base, load_tuned
from diablo_export.trainer.train import train
from tests import packed
from tests.onnx_runs import IDS, LOGITS, runner
from tests.test_quantized import exact

Folder = Callable[[str], Path]
RUN: dict[str, Any] = {"num_blocks": 4, "lr": 0.02, "max_steps": 4, "batch_size": 2, "max_length": 16, "seed": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "mat", "and", "dog", "log"], 3000)
    file.write_text(json.dumps({"text": " ".join(words)}))
    return file


@pytest.fixture(scope="module")
def base2(tiny_model: Folder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base2") / "base"
    quantize(tiny_model("llama"), folder, bits=2, calibration=text)
    return folder


def test_a_gptq_checkpoint_that_others_read(base2: Path, tiny_model: Folder) -> None:
    config = json.loads((base2 / "config.json").read_text())
    wanted = {"quant_method": "gptq", "bits": 2, "group_size": 32, "desc_act": False, "sym": True}
    assert config["quantization_config"].items() >= wanted.items()
    checkpoint, floats = Checkpoint.open(base2), load_file(tiny_model("llama") / "model.safetensors")
    tensors = load_file(base2 / "model.safetensors")
    modules = {one.name for one in all_stored(checkpoint)}
    assert len(modules) == 14 and "lm_head" not in modules
    for name in modules:
        # by the reader of tests/packed.py, which knows nothing of the writer
        found = packed.dense(packed.parts(tensors, name), "gptq", bits=2, v2=True)
        one = stored(checkpoint, name)
        assert one is not None and np.array_equal(found, one.unpacked().values())
        assert np.abs(found - floats[f"{name}.weight"]).max() < np.abs(floats[f"{name}.weight"]).max()
    for name in tensors.keys() & floats.keys():
        assert np.array_equal(tensors[name], floats[name])
    assert (base2 / "tokenizer.json").exists()


def test_codes_that_are_calibrated_leave_the_least_error_of_outputs() -> None:
    random = np.random.default_rng(1)
    inputs = random.normal(size=(500, 64)) @ random.normal(size=(64, 64))  # they vary together
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    weight = random.normal(size=(16, 64)).astype(np.float32)
    errors = {}
    for method in fresh.METHODS:
        for symmetric in (True, False):
            grid = fresh.quantized(weight, 2, 16, symmetric, method, moments)
            off = grid.values() - weight
            errors[method, symmetric] = float(((off @ moments) * off).sum()), float((off**2).sum())
            assert (grid.zeros == 2).all() == symmetric
    for symmetric in (True, False):
        of_outputs = [errors[method, symmetric][0] for method in ("calibrated", "gptq", "rtn")]
        assert of_outputs == sorted(of_outputs)
        assert errors["refit", symmetric][1] < errors["rtn", symmetric][1]
    plain = fresh.quantized(weight, 4, 16, True, "rtn").values()
    # the codes of `--base-quantize`, but for scales in float16: off by a 2048th of 8 steps at most
    assert np.abs(plain - dequantize(nearest(weight, 4, 16))).max() < np.abs(weight).max() / 8


def test_many_rows_are_quantized_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(2).normal(size=(64, 40)).astype(np.float32)  # a short last group
    moments = np.eye(40, dtype=np.float32)
    whole = [fresh.quantized(weight, 4, 16, False, method, moments) for method in fresh.METHODS]
    monkeypatch.setattr(fresh, "_AT_ONCE", 40 * 24)
    for method, one in zip(fresh.METHODS, whole, strict=True):
        parts = fresh.quantized(weight, 4, 16, False, method, moments)
        assert parts.codes.shape == (64, 40) and parts.scales.shape == (64, 3)
        assert np.array_equal(parts.codes, one.codes) and np.array_equal(parts.scales, one.scales)


def test_trained_beside_and_exported_with_the_codes_themselves(base2: Path, text: Path, tmp_path: Path) -> None:
    done = train(base2, text, tmp_path / "a", eval_data=text, **RUN)
    assert done.evaluations[-1]["eval_loss"] < done.evaluations[0]["eval_loss"]
    manifest = export(base2, tmp_path / "a", tmp_path / "out")
    assert manifest["quantize"] == "int2"
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    held = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    codes = sorted(held[node.input[1]].tobytes() for node in nodes)
    grids = [one.unpacked() for one in all_stored(Checkpoint.open(base2))]
    assert codes == sorted(fresh.codec.pack(grid.codes, 2).tobytes() for grid in grids)  # type: ignore[union-attr]
    tuned, _ = load_tuned(base2, Adapter.load(tmp_path / "a"))
    with torch.no_grad():
        wanted = tuned(torch.from_numpy(IDS)).logits.numpy()
    found = runner(exact(tmp_path / "out"))(tmp_path / "out/adapters/a.onnx_adapter")
    assert np.abs(found - wanted.reshape(found.shape)).max() <= LOGITS


def test_a_classifier(tiny_model: Folder, tmp_path: Path) -> None:
    done = quantize(tiny_model("bert"), tmp_path / "q", bits=8, method="rtn", task="text-classification")
    whole, _ = load_base(tiny_model("bert"), "text-classification")
    found, _ = load_base(tmp_path / "q", "text-classification")
    layers = [entry["name"] for entry in done["modules"] if entry["action"] == "quantized"]
    assert len(layers) == 12 and done["options"]["group_size"] == 16 and done["options"]["asymmetric"]
    for name in layers:
        wanted = whole.get_parameter(f"{name}.weight").detach()
        # a step of a group is at most 2 / 255 of its largest weight; float16's rounding of the scale comes on top
        assert torch.allclose(found.get_submodule(name).weight, wanted, atol=float(wanted.abs().max()) / 120)


def test_the_command_says_what_is_left(
    run: Callable[..., Result], tiny_model: Folder, text: Path, tmp_path: Path
) -> None:
    options = ["--output", tmp_path / "q", "--bits", 4, "--calibration", text]
    result = run("quantize", "--model", tiny_model("llama"), *options)
    assert result.exit_code == 0, result.output
    assert re.search(r"14 of 14 layers in int4, symmetric groups of 32, calibrated on \d+ \+ \d+ seq", result.output)
    assert "loss on text held back" in result.output and "next: diablo-export train" in result.output
    without = run("quantize", "--model", tiny_model("llama"), "--output", tmp_path / "r", "--method", "refit", "--json")
    assert re.search("sampled from the model", json.loads(without.stdout)["text"])
    again = run("quantize", "--model", tmp_path / "q", "--output", tmp_path / "p")
    assert again.exit_code == 2 and "is quantized already; give the float model" in again.output
    assert not (tmp_path / "p").exists()


def test_what_cannot_be_quantized(tiny_model: Folder, tmp_path: Path) -> None:
    assert fresh.fault((64, 172), 2) == "172 inputs at 2 bits are no whole words of GPTQ's format"
    assert fresh.fault((64, 172), 8) is None
    for options, message in (
        ({"bits": 3}, "3 bits in groups of 32: bits must be one of"),
        ({"method": "awq"}, "method is 'awq'; choose one of calibrated, gptq, refit, rtn"),
        ({"task": "vision"}, "task is 'vision'; choose one of"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(tiny_model("llama"), tmp_path / "q", **options)
    with pytest.raises(CheckpointError, match="gpt2 keeps its weights the other way round"):
        quantize(tiny_model("gpt2"), tmp_path / "q")
