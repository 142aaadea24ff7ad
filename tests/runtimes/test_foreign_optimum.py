"""What optimum exports of a merged DoRA adapter passes parity, what it exports of the base fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diablo_export.measure.parity import parity
from tests import exports, foreign
from tests.exports import SMALL
from tests.runtimes import tools

pytestmark = pytest.mark.runtimes


def with_optimum(model: Path, folder: Path) -> Path:
    command = [tools.optimum(), "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", model]
    command += ["--task", "text-generation-with-past", folder]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_exports_of_optimum_are_judged(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = tiny_model("llama")
    adapter = foreign.make_peft(model, tmp_path / "dora", use_dora=True)
    merged = foreign.merge_peft(model, adapter, tmp_path / "merged")
    whole = parity(with_optimum(merged, tmp_path / "whole"), model=model, adapter=[str(adapter)], **SMALL)
    assert whole["verdict"] == "pass", exports.failed(whole)
    # its decoders take positions and a mask, so batches may be padded at either side
    assert {"padding.right", "padding.left", "decode.max_abs"} <= set(exports.checks(whole))
    lost = parity(with_optimum(model, tmp_path / "lost"), model=model, adapter=[str(adapter)], **SMALL)
    assert {"adapter.whole", "adapter.alive"} <= exports.failed(lost)
