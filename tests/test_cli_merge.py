from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import Result

from diablo_export.adapter import Adapter
from tests.test_cli_export import refused, with_blocks
from tests.test_hf_merge import remark
from tests.tiny import rewrite

Run = Callable[..., Result]
Get = Callable[..., Path]


def test_summary_names_folder_files_and_the_next_step(
    run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    out = tmp_path / "the output"
    result = run(
        "merge", "--model", tiny_model("llama"), "--adapter", tiny_adapter("llama"), "--quantize", "int4",
        "--group-size", 16, "--method", "rtn", "--output", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "14 modules merged from adapter" in result.stdout
    assert "model.onnx.data" in result.stdout
    assert result.stdout.endswith(f"next: diablo-export parity '{out}' --data test.jsonl\n")
    manifest = json.loads((out / "diablo_export.json").read_text())
    assert (manifest["options"]["group_size"], manifest["options"]["format"]) == (16, "onnx")


def test_json_is_the_manifest(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    result = run("merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert manifest == json.loads((tmp_path / "out/diablo_export.json").read_text())
    assert manifest["format"] == "hf"


@pytest.mark.parametrize(
    ("options", "dtype", "name"),
    [
        ([], ml_dtypes.bfloat16, "model.safetensors"),
        (["--format", "onnx", "--precision", "fp16"], np.float16, "model.onnx"),
    ],
)
def test_a_merge_that_rounding_took_away(
    options: list[str], dtype: Any, name: str, run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    base = rewrite(tiny_model("llama"), tmp_path / "base", lambda n, v: (n, v.astype(dtype)))
    whole = remark(Adapter.load(tiny_adapter("llama")), base)
    for scale, exit_code in ((1e-6, 1), (1, 0)):
        blocks = {n: dataclasses.replace(m, blocks=m.blocks * np.float32(scale)) for n, m in whole.modules.items()}
        adapter = tmp_path / f"adapter-{exit_code}"
        adapter.mkdir()
        dataclasses.replace(whole, modules=blocks).save(adapter)
        result = run("merge", "-m", base, "-a", adapter, "-o", tmp_path / f"out-{exit_code}", *options)
        assert result.exit_code == exit_code, result.output
        assert ("took more than half of the blocks of 14 of 14 modules" in result.output) == bool(exit_code)
        assert (tmp_path / f"out-{exit_code}" / name).is_file()
        assert ("q_proj keeps 0%" in caplog.text or "k_proj keeps 0%" in caplog.text) == bool(exit_code)
        caplog.clear()


def test_help_has_an_example(run: Run) -> None:
    result = run("merge", "--help")
    assert "Example:" in result.stdout
    assert "auto|rtn|refit|calibrated|distilled" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int4", "--format", "hf"], "--quantize int4 needs --format onnx"),
        (["--precision", "fp16"], "--precision is for --format onnx"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", out, *options)
    assert message in refused(result, out)


@pytest.mark.parametrize("options", [[], ["--quantize", "int8"]])
def test_another_base(options: list[str], run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("merge", "-m", tiny_model("llama-tied"), "-a", tiny_adapter("qwen2"), "-o", out, *options)
    message = refused(result, out)
    assert f"does not belong to the model {tiny_model('llama-tied')}" in message
    assert "other values" in message


def test_missing_modules(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = refused(run("merge", "-m", tiny_model("gpt2"), "-a", tiny_adapter("llama"), "-o", out), out)
    assert "14 of 14 modules do not fit" in message


def test_nan_blocks(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = with_blocks(tiny_adapter("llama"), tmp_path / "bad", lambda blocks: blocks * np.float32(np.nan))
    assert "holds NaN or inf" in refused(run("merge", "-m", tiny_model("llama"), "-a", bad, "-o", out), out)


def test_a_pickle_is_not_opened(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refused(run("merge", "-m", model, "-a", tiny_adapter("llama"), "-o", out), out)
    assert "pytorch_model.bin, which are pickles and are not opened" in message


def test_truncated_model(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    os.truncate(model / "model.safetensors", 5000)
    message = refused(run("merge", "-m", model, "-a", tiny_adapter("llama"), "-o", out), out)
    assert "model.safetensors: cut short" in message


def test_an_onnx_model_stays_one(run: Run, genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("merge", "-m", genai_graph("llama", "int4").parent, "-a", tiny_adapter("llama"), "-o", out)
    assert "is ONNX already and keeps its weights' types" in refused(run(*arguments, "--quantize", "int8"), out)
    result = run(*arguments, "--method", "rtn")
    assert result.exit_code == 0, result.output
    assert "made by: given (model.onnx is an ONNX model already)" in result.stdout


def test_existing_output(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    arguments = ("merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", tmp_path / "out")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    assert not (tmp_path / "out/old.txt").exists()


def test_of_several_adapters_none_is_lost_in_silence(
    run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    adapters = ("-a", tiny_adapter("llama"), "-a", tmp_path / "other")
    result = run("merge", "-m", tiny_model("llama"), *adapters, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "2 were given (" in result.stderr and "diablo-export export takes several" in result.stderr
    assert not any(tmp_path.iterdir())
