"""diablo-export convert on the command line: exit codes and messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Folder = Callable[[str], Path]
Run = Callable[..., Result]


def test_there_and_back(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path, run: Run) -> None:
    model, file = tiny_model("llama"), tmp_path / "adapter.chkpt"
    written = run("convert", tiny_adapter("llama"), "--model", model, "--output", file)
    assert written.exit_code == 0, written.output
    read = run("convert", file, "--model", model, "--output", tmp_path / "adapter")
    assert read.exit_code == 0, read.output
    assert "14 modules" in read.stdout and "num_blocks 4" in read.stdout
    before = (tiny_adapter("llama") / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_bad_input_is_one_message_and_exit_code_2(tiny_model: Folder, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "adapter.chkpt"
    file.write_bytes(b"nothing")
    result = run("convert", file, "--model", tiny_model("llama"), "--output", tmp_path / "adapter")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and str(file) in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "adapter").exists()


def test_an_existing_output_needs_overwrite(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "adapter.chkpt"
    run("convert", tiny_adapter("llama"), "--model", tiny_model("llama"), "--output", file)
    arguments = ("convert", file, "--model", tiny_model("llama"), "--output", tiny_adapter("llama"))
    result = run(*arguments)
    assert result.exit_code == 2 and "--overwrite" in result.stderr
