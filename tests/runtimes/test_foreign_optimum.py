"""What optimum exports of a merged DoRA adapter passes parity, what it exports of the base fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diablo_export.measure.parity import parity
from diablo_export.measure.verify import verify
from tests import exports, foreign
from tests.exports import SMALL
from tests.runtimes import tools

pytestmark = pytest.mark.runtimes


def with_optimum(model: Path, folder: Path, task: str = "text-generation-with-past") -> Path:
    command = [tools.optimum(), "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", model]
    command += ["--task", task, folder]
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


def test_a_classifier_of_optimum_with_lora(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    bert = tiny_model("bert")
    adapter = foreign.make_peft(bert, tmp_path / "lora", **foreign.CLASSIFIER)
    merged = foreign.merge_peft(bert, adapter, tmp_path / "merged")
    out = with_optimum(merged, tmp_path / "whole", "text-classification")
    whole = parity(out, model=bert, adapter=[str(adapter)], certificate=True, **SMALL)
    assert whole["verdict"] == "pass", exports.failed(whole)
    assert "padding.right" in exports.checks(whole)  # it takes a mask
    assert verify(out)["verdict"] == "pass"
    lost = with_optimum(bert, tmp_path / "lost", "text-classification")
    assert "adapter.whole" in exports.failed(parity(lost, model=bert, adapter=[str(adapter)], **SMALL))
