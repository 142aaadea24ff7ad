"""What all commands share: streams that cannot hold every letter, and colours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from diablo_export import __version__

Monkey = pytest.MonkeyPatch
PROGRAM = (sys.executable, "-c", "from diablo_export.cli import main; main()")


def test_a_stream_that_cannot_hold_every_letter(tiny_adapter: Callable[[str], Path]) -> None:
    """As on a Windows machine that writes into a file: sizes are written with ×."""
    command = [*PROGRAM, "inspect", str(tiny_adapter("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "4 ? 24 ? 16" in done.stdout


@pytest.mark.parametrize("asked", [True, False])
def test_no_color_is_kept_to(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if asked:
        monkeypatch.setenv("NO_COLOR", "1")
    ours, terminal = os.openpty()
    done = subprocess.run([*PROGRAM, "inspect", "absent"], stderr=terminal)
    said = os.read(ours, 4096).decode()
    assert done.returncode == 2 and "error:" in said and ("\x1b[31m" in said) is not asked


def test_a_full_disk_under_standard_output_is_no_failed_check(tiny_adapter: Callable[[str], Path]) -> None:
    with open("/dev/full", "w") as full:
        command = [*PROGRAM, "inspect", str(tiny_adapter("llama")), "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: what is printed: No space left on device")


def test_a_file_that_cannot_be_read_is_no_failed_check(run: Callable[..., Result], monkeypatch: Monkey) -> None:
    def closed(path: str, model: str | None, adapter: str | None) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "out/model.onnx.data")

    monkeypatch.setattr("diablo_export.converters.inspection.inspect", closed)
    result = run("inspect", "out")
    assert (result.exit_code, result.stderr) == (2, "error: out/model.onnx.data: Permission denied\n")


def test_python_runs_the_package() -> None:
    command = [sys.executable, "-m", "diablo_export", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"diablo-export, version {__version__}\n"), done.stderr
