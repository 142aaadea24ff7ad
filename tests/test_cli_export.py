from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import DTYPE_NAMES, read_header, write_safetensors
from tests import tiny

Run = Callable[..., Result]
Get = Callable[..., Path]


def refused(result: Result, output: Path) -> str:
    """The one message of a command that stopped for bad input and left nothing."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("error:") == 1
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if "partial" in path.name]
    return result.stderr


def with_blocks(adapter: Path, to: Path, change: Callable[[Array], Array]) -> Path:
    """A copy of an adapter, its first tensor changed."""
    shutil.copytree(adapter, to)
    file = to / "adapter_model.safetensors"
    values = {name: info.read() for name, info in read_header(file)[0].items()}
    first = next(iter(values))
    values[first] = change(values[first])
    write_safetensors(file, {n: (DTYPE_NAMES[v.dtype], v.shape) for n, v in values.items()}, values.items())
    return to


def test_summary_names_folder_files_and_the_next_step(
    run: Run, tiny_model: Get, tiny_adapter: Get, other_adapter: Get, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(
        "export", "--model", tiny_model("llama"), "--adapter", f"bard={tiny_adapter('llama')}",
        "--adapter", f"tales={other_adapter('llama')}", "--quantize", "int4", "--output", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{out}: " in result.stdout
    assert "14 modules with a branch from bard, tales" in result.stdout
    assert "adapters/tales.onnx_adapter" in result.stdout
    assert "made by: genai (" in result.stdout
    assert f"next: diablo-export parity {out}" in result.stdout
    assert sorted(path.name for path in (out / "adapters").iterdir()) == ["bard.onnx_adapter", "tales.onnx_adapter"]


def test_blocks_in_int8(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("export", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", out, "--block-dtype", "int8")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "diablo_export.json").read_text())["options"]["block_dtype"] == "int8"
    wrong = run("export", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", out, "--block-dtype", "int4")
    assert wrong.exit_code == 2 and "'int4' is not one of 'fp32', 'fp16', 'int8'" in wrong.stderr


def test_json_is_the_manifest(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    result = run("export", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "out/diablo_export.json").read_text())


def test_quiet(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    result = run("export", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", tmp_path / "out", "-q")
    assert (result.exit_code, result.stdout) == (0, "")


def test_help_has_an_example(run: Run) -> None:
    result = run("export", "--help")
    assert "Example:" in result.stdout
    assert "--for [ort|web]" in result.stdout


def test_another_base(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("export", "-m", tiny_model("llama-tied"), "-a", tiny_adapter("qwen2"), "-o", out)
    message = refused(result, out)
    assert f"the adapter {tiny_adapter('qwen2')} does not belong to the model {tiny_model('llama-tied')}" in message
    assert "has other values than the one this adapter was trained on" in message


def test_other_sizes(run: Run, tiny_model: Get, tmp_path: Path) -> None:
    wide = tiny.make_model("llama", tmp_path / "wide", intermediate_size=128)
    adapter = tiny.make_adapter(wide, tmp_path / "adapter")
    out = tmp_path / "out"
    message = refused(run("export", "-m", tiny_model("llama"), "-a", adapter, "-o", out), out)
    assert "the model's weight is [96, 64], the adapter's is [128, 64] (out, in)" in message


def test_missing_modules(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = refused(run("export", "-m", tiny_model("gpt2"), "-a", tiny_adapter("llama"), "-o", out), out)
    assert "model.layers.0.mlp.up_proj: the model has no such weight" in message
    assert "14 of 14 modules do not fit" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks: np.full_like(blocks, np.nan), "holds NaN or inf"),
        (lambda blocks: np.full_like(blocks, np.inf), "holds NaN or inf"),
        (lambda blocks: blocks[:2], "the module's in_features is"),
    ],
)
def test_bad_blocks(
    change: Callable[[Array], Array],
    message: str,
    run: Run,
    tiny_model: Get,
    tiny_adapter: Get,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    bad = with_blocks(tiny_adapter("llama"), tmp_path / "bad", change)
    assert message in refused(run("export", "-m", tiny_model("llama"), "-a", bad, "-o", out), out)


def test_truncated_adapter(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad"
    shutil.copytree(tiny_adapter("llama"), bad)
    os.truncate(bad / "adapter_model.safetensors", 3000)
    assert "adapter_model.safetensors: cut short" in refused(
        run("export", "-m", tiny_model("llama"), "-a", bad, "-o", out), out
    )


def test_onnx_of_another_base(run: Run, genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("export", "-m", genai_graph("qwen2", "fp32").parent, "-a", tiny_adapter("gpt2"), "-o", out)
    message = refused(result, out)
    assert "8 of the 8 adapted modules could not be tied to the graph" in message
    assert "transformer.h.1.mlp.c_proj: no linear node has the values of its base weight (256 → 64" in message


def test_no_such_things(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such model folder" in refused(
        run("export", "-m", "./nothing", "-a", tiny_adapter("llama"), "-o", out), out
    )
    assert "no such adapter folder" in refused(
        run("export", "-m", tiny_model("llama"), "-a", "nothing", "-o", out), out
    )


def test_existing_output(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    result = run("export", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "exists already; choose another --output, or give --overwrite" in result.stderr
    assert (tmp_path / "out/old.txt").read_text() == "old"


def test_output_under_a_file(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    result = run("export", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", tmp_path / "file/out")
    assert result.exit_code == 2
    assert "cannot be made" in result.stderr
