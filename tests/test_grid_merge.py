"""Merges that measure: methods, what they leave alone, what they report, and what they refuse."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file, save_file

from diablo_export.adapter import Adapter, file_sha256
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import budget, grid_merge, grid_methods
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_linears import linears
from diablo_export.converters.onnx_match import match
from diablo_export.errors import AdapterError, DataError, InputError
from diablo_export.manifest import read_manifest
from tests import tiny
from tests.test_cli_export import with_blocks
from tests.test_onnx_merge import grid, touched

Get = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to run every line: quality is measured on real models, by examples/benchmarks/merge_methods.py."""
    monkeypatch.setattr(grid_methods, "_LENGTH", 32)
    monkeypatch.setattr(grid_methods, "_JUDGED", 4)
    monkeypatch.setattr(grid_methods, "_MOMENTS", 4)
    monkeypatch.setattr(grid_methods, "_FITTED", 6)
    monkeypatch.setattr(grid_methods, "_WRITTEN", 6)
    monkeypatch.setattr(budget, "STEPS", 40)
    monkeypatch.setattr(budget, "BATCH_TOKENS", 128)
    monkeypatch.setattr(budget, "_LEAST_TOKENS", 64)


def rows(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in manifest["survival"]["tried"]}


@pytest.mark.parametrize("method", ["refit", "calibrated", "distilled"])
def test_an_int4_model_changes_in_touched_groups_only(
    method: str, genai_graph: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    given = genai_graph("llama", "int4")
    manifest = merge(given.parent, tiny_adapter("llama"), tmp_path / "out", method=method, min_survival=0.1)
    adapter, model = Adapter.load(tiny_adapter("llama")), ir.load(given)
    after = {layer.name: layer for layer in linears(ir.load(tmp_path / "out/model.onnx"))}
    free = {
        layer.name: np.ones((layer.out_features, -(-layer.in_features // 32)), np.bool_) for layer in after.values()
    }
    for name, one in match(model, adapter.modules).items():
        (piece,) = one.pieces
        met = touched(adapter.modules[name].shape, 32)
        free[piece.linear.name][piece.start : piece.stop] &= ~met  # q, k and v share a node
        entry = next(entry for entry in manifest["modules"] if entry["name"] == name)
        assert (entry["touched_groups"], entry["codes"]) == (met.sum(), met.size * 32)
    for layer in linears(model):
        old, new = grid(layer), grid(after[layer.name])
        assert np.array_equal(old.codes[free[layer.name]], new.codes[free[layer.name]])
        assert np.array_equal(old.scales[free[layer.name]], new.scales[free[layer.name]])
    changed = rows(manifest)[method]
    assert changed["codes_changed"] > 0.01
    before, now = given.with_suffix(".onnx.data").read_bytes(), (tmp_path / "out/model.onnx.data").read_bytes()
    assert len(before) == len(now)
    inside = np.zeros(len(before), np.bool_)
    for layer in linears(model):
        for value in (layer.weight, layer.scales):
            assert value is not None and isinstance(value.const_value, ir.ExternalTensor)
            offset, length = value.const_value.offset or 0, value.const_value.length or 0
            inside[offset : offset + length] = not free[layer.name].all()
    differ = np.frombuffer(before, np.uint8) != np.frombuffer(now, np.uint8)
    assert differ.any() and not differ[~inside].any()


def test_auto_takes_the_best_of_what_takes_seconds(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    manifest = merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", quantize="int4", min_survival=0.8)
    survival = manifest["survival"]
    quick, lost = ["rtn", "refit", "calibrated"], {row["method"]: row["kl"] for row in survival["tried"]}
    enough = min(lost[method] for method in quick) <= 0.25 * lost["rtn"]  # else a model so small is distilled as well
    assert list(lost) == (quick if enough else [*quick, "distilled"])
    assert survival["method"] == min(survival["tried"], key=lambda row: row["kl"])["method"]
    assert survival["passed"] and all(row["holds"] for row in survival["tried"])
    assert "sampled from the tuned model" in survival["text"]
    # the network that was measured is the file: int8 activations are what is left between the two
    assert survival["runtime_cosine"] > 0.998
    assert manifest == read_manifest(tmp_path / "out")
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == file_sha256(tmp_path / "out" / name)
    modules = survival["tried"][0]["modules"]
    assert modules.keys() == Adapter.load(tiny_adapter("llama")).modules.keys()
    assert all(0.8 < module["gain"] < 1.2 and module["cosine"] > 0.8 for module in modules.values())


def test_what_is_measured_as_rtn_is_what_rounding_gives(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "rtn", quantize="int4", method="rtn")
    other, adapter = tmp_path / "measured", Adapter.load(tiny_adapter("llama"))
    other.mkdir()
    build_graph(tiny_model("llama"), other, quantize="int4", head=adapter)
    grid_merge.grid_merge(
        other, adapter, reference=tiny_model("llama"), method="rtn", has_head=True,
        float_base=Checkpoint.open(tiny_model("llama")),
    )  # fmt: skip
    assert (tmp_path / "rtn/model.onnx.data").read_bytes() == (other / "model.onnx.data").read_bytes()


def test_what_to_give_is_what_is_not_given_yet(
    run: Run, tiny_model: Get, tiny_adapter: Get, genai_graph: Callable[..., Path], tmp_path: Path
) -> None:
    tight = ("-a", tiny_adapter("llama"), "--method", "refit", "--min-survival", 0.9999)
    made = ("--quantize", "int4", "--group-size", 16, "--asymmetric")
    result = run("merge", "-m", tiny_model("llama"), *tight, *made, "-o", tmp_path / "made")
    assert result.exit_code == 1
    text = "--calibration with text of the fine-tune's kind"
    assert f"Give --method auto, {text}, --plan auto, --quantize int8, a lower --min-survival, or" in result.stderr
    given, data = genai_graph("llama", "int4"), tmp_path / "text.txt"
    data.write_text("the cat sat on the mat\n\n" * 40)
    result = run("merge", "-m", given, *tight, "--calibration", data, "-o", tmp_path / "given")
    assert result.exit_code == 1, result.stderr
    assert "Give --method auto, --plan auto, a lower --min-survival, or keep the blocks" in result.stderr


def test_what_misses_stays_and_is_marked(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "--quantize", "int4", "-o", out)
    result = run(*arguments, "--min-survival", 0.999, "--max-seconds", 3600)
    assert result.exit_code == 1
    assert "the fine-tune does not survive as asked: gain" in result.stderr
    assert "(asked: within 0.001 of 1)" in result.stderr and "(asked: 0.999)" in result.stderr
    assert "survival on 8 sequences of 32 tokens, sampled from the tuned model" in result.stdout
    assert "next:" not in result.stdout
    survival = read_manifest(out)["survival"]
    assert not survival["passed"]
    tried = [row["method"] for row in survival["tried"]]
    assert tried == ["rtn", "refit", "calibrated", "distilled"]
    assert survival["method"] == min(survival["tried"], key=lambda row: row["kl"])["method"] != "rtn"
    as_json = run(*arguments, "--min-survival", 0.999, "--overwrite", "--method", "refit", "--json")
    assert as_json.exit_code == 1
    assert "Give --calibration with" in result.stderr and "Give --method auto, --calibration with" in as_json.stderr
    assert json.loads(as_json.stdout)["survival"]["method"] == "refit"


def test_a_weak_fine_tune_is_called_that(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    weak = shutil.copytree(tiny_adapter("llama"), tmp_path / "adapter")
    file = weak / "adapter_model.safetensors"
    save_file({name: 0.01 * blocks for name, blocks in load_file(file).items()}, file)
    for adapter, said in ((weak, True), (tiny_adapter("llama"), False)):
        result = run(
            "merge", "-m", tiny_model("llama"), "-a", adapter, "--quantize", "int4", "--method", "refit",
            "--min-survival", 0.999, "-o", tmp_path / "out", "--overwrite",
        )  # fmt: skip
        assert result.exit_code == 1, result.output
        assert ("train it longer, or at a higher --lr" in result.stderr) is said


def test_blocks_of_zeros_have_no_gain(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """Nothing was wanted of such a module; JSON has no NaN to say so."""
    adapter = with_blocks(tiny_adapter("llama"), tmp_path / "adapter", lambda blocks: blocks * 0)
    result = run(
        "merge", "-m", tiny_model("llama"), "-a", adapter, "--quantize", "int4", "--method", "refit",
        "--min-survival", 0.5, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in (result.stdout, (tmp_path / "out/diablo_export.json").read_text()):
        gains = [
            one["gain"]
            for one in json.loads(text, parse_constant=pytest.fail)["survival"]["tried"][0]["modules"].values()
        ]
        assert gains.count(None) == 1 and len(gains) == 14


def test_calibration_data(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"the {animal} sat on the log and the mat"}) for animal in ("cat", "dog", "hen")]
    (tmp_path / "text.jsonl").write_text("\n".join(lines * 20))
    arguments: Any = (tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    manifest = merge(
        *arguments, quantize="int4", calibration=tmp_path / "text.jsonl", method="calibrated", min_survival=0.1
    )
    assert f"sequences of {tmp_path / 'text.jsonl'}" in manifest["survival"]["text"]
    assert manifest["options"]["calibration"] == str(tmp_path / "text.jsonl")


def test_a_classifier_is_distilled_from_calibrated_codes(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """It says little to each text: codes that are found by that alone lose more than those they could begin at."""
    words = ["the", "cat", "sat", "on", "the", "log", "and", "the", "dog", "ran", "to", "the", "mat"]
    lines = [json.dumps({"text": " ".join(words[at:] + words[:at] * (1 + at % 3))}) for at in range(len(words))]
    (tmp_path / "text.jsonl").write_text("\n".join(lines * 4))
    kept = {}
    for method in ("calibrated", "distilled"):
        manifest = merge(
            tiny_model("bert"), tiny_adapter("bert"), tmp_path / method, quantize="int4", min_survival=0.9999,
            method=method, calibration=tmp_path / "text.jsonl",
        )  # fmt: skip
        kept[method] = rows(manifest)[method]
    assert kept["distilled"]["steps"] == 40
    assert kept["distilled"]["kl"] <= kept["calibrated"]["kl"]


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no examples"), ("one sequence", "is one sequence of 32 tokens at most")]
)
def test_too_little_calibration_data(
    content: str, message: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        merge(
            tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", quantize="int4",
            calibration=tmp_path / "text.txt",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_reference_must_be_the_adapters_base(
    genai_graph: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = genai_graph("llama", "int4").parent
    with pytest.raises(InputError, match=r"--method auto runs the float model(.|\n)*does not belong to the model"):
        merge(given, tiny_adapter("llama"), tmp_path / "out", reference=tiny_model("qwen2"))
    with pytest.raises(InputError, match="are two different models: they differ outside of the adapted layers"):
        merge(given, tiny_adapter("llama"), tmp_path / "out", reference=tiny_model("llama-tied"))  # other embeddings
    nowhere = tiny.make_adapter(tiny_model("llama"), tmp_path / "adapter")
    config = json.loads((nowhere / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (nowhere / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"--method calibrated .*the adapter does not name its base.*--reference"):
        merge(given, nowhere, tmp_path / "out", method="calibrated")
    with caplog.at_level(logging.WARNING, logger="diablo_export"):
        manifest = merge(given, nowhere, tmp_path / "out")
    assert "rounded to the nearest, and what is left of the fine-tune not measured" in caplog.text
    assert (manifest["options"]["method"], "survival" in manifest) == ("rtn", False)
    named = merge(
        given, nowhere, tmp_path / "out", overwrite=True, reference=tiny_model("llama"), method="refit",
        min_survival=0.1,
    )  # fmt: skip
    assert named["survival"]["method"] == "refit"


def test_an_adapter_of_another_base(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not belong to the model"):
        merge(tiny_model("llama-tied"), tiny_adapter("qwen2"), tmp_path / "out", quantize="int4")
    assert not any(tmp_path.iterdir())


def test_groups_that_straddle_blocks(tiny_model: Get, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny_model("llama"), tmp_path / "adapter", num_blocks=3)
    arguments: Any = (tiny_model("llama"), adapter, tmp_path / "out")
    manifest = merge(*arguments, quantize="int4", method="refit", min_survival=0.1)
    disturbed = {entry["name"].rpartition(".")[2]: entry["disturbed_weights"] for entry in manifest["modules"]}
    assert disturbed["up_proj"] > 0  # 64 inputs in blocks of 22: groups of 32 reach beyond them
    assert disturbed["down_proj"] == 0  # 96 inputs in blocks of 32


def test_a_device_that_is_too_small(
    tiny_model: Get,
    tiny_adapter: Get,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments: Any = (tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    with caplog.at_level(logging.WARNING, logger="diablo_export"):
        slow = merge(*arguments, quantize="int4", min_survival=0.999, max_seconds=0.01)
    assert "not distilled: 40 steps of 64 tokens would take about" in caplog.text
    assert list(rows(slow)) == ["rtn", "refit", "calibrated"]
    monkeypatch.setattr("diablo_export.converters.sizes.COPIES", 1e12)
    with pytest.raises(InputError, match=r"--method auto: the model in torch takes about .* GB of memory"):
        merge(*arguments, quantize="int4", method="auto", overwrite=True)
    with caplog.at_level(logging.WARNING, logger="diablo_export"):
        small = merge(*arguments, quantize="int4", overwrite=True)
    assert small["options"]["method"] == "rtn" and "not measured: the model in torch takes about" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "qwen2", "phi3", "gemma3"])
def test_other_architectures(architecture: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    manifest = merge(
        tiny_model(architecture), tiny_adapter(architecture), tmp_path / "out", quantize="int4", method="calibrated",
        min_survival=0.1,
    )  # fmt: skip
    survival = manifest["survival"]
    assert survival["passed"]
    assert survival["runtime_cosine"] > 0.98  # the network that was measured is the file
    assert ("random tokens" in survival["text"]) == (architecture == "bert")


@pytest.mark.slow
def test_asymmetric_and_half_precision(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    arguments: Any = (tiny_model("qwen2"), tiny_adapter("qwen2"))
    for number, options in enumerate(({"asymmetric": True}, {"precision": "fp16"})):
        manifest = merge(
            *arguments, tmp_path / str(number), quantize="int4", method="calibrated", min_survival=0.1, **options
        )
        assert manifest["survival"]["runtime_cosine"] > 0.98


@pytest.mark.parametrize(("room", "where"), [(1.0, "cpu"), (10.0, "cuda")])
def test_a_network_that_does_not_fit_the_gpu_stays_on_the_processor(
    room: float, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = torch.nn.Linear(100, 100)
    size = sum(parameter.nbytes for parameter in network.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(room * size), 1 << 40))
    assert budget.place(network) == where
    assert ("it is done on the processor" in caplog.text) == (where == "cpu")
