"""A step whose numbers break: the module is named, and nothing of it is saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from diablo_export.errors import InputError
from diablo_export.trainer.nonfinite import first_nonfinite
from diablo_export.trainer.state import CHECKPOINT, STATE, save_state
from diablo_export.trainer.train import train


class Scale(torch.autograd.Function):
    """Multiplies by one factor on the way forward, by another on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factor, None, None


class Break(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.factors = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        broken: Tensor = Scale.apply(x, *self.factors)
        return broken


def network(forward: float = 1.0, backward: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Break(forward, backward), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("forward", "backward", "words"),
    [
        (torch.nan, 1.0, "first in the output of 2 (NaN)"),
        (torch.inf, 1.0, "first in the output of 2 (infinity)"),
        (1.0, torch.nan, "first in the gradient that reaches the output of 1 (NaN)"),
        (1.0, torch.inf, "first in the gradient that reaches the output of 1 (infinity)"),
        (1.0, 1e30, "in no module by itself; the largest gradient is that of 1."),
    ],
)
def test_first_module_is_named(forward: float, backward: float, words: str) -> None:
    model = network(forward, backward)
    x = torch.randn(3, 4)
    assert first_nonfinite(model, iter([lambda: model(x).sum()])).startswith(words)
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_and_losses_that_are_broken_themselves() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    assert first_nonfinite(model, iter([])) == "3.weight itself holds NaN"
    assert first_nonfinite(network(), iter([])) == "in no module's output, but in the loss itself"


def test_last_good_checkpoint_stays(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 6}) + "\n")
    run: dict[str, Any] = {"num_blocks": 4, "max_length": 16, "batch_size": 2, "max_steps": 5, "checkpoint_every": 2}

    def rates(lr: float, steps: int, warmup: int, schedule: str) -> Callable[[int], float]:
        return lambda step: 1e30 if step == 2 else lr

    caplog.set_level("INFO", "diablo_export")  # whatever a test before has asked to see
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"at step 4 .*model\.layers\.0\.self_attn"):
        patch.setattr("diablo_export.trainer.run.learning_rate", rates)
        train(tiny_model("llama"), data, tmp_path / "a", **run)
    folder = tmp_path / "a.training"
    assert f"{folder} keeps the checkpoint after step 2" in caplog.text
    assert json.loads((folder / CHECKPOINT / STATE).read_text())["step"] == 2


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()

    def save(step: int) -> None:
        save_state(tmp_path / "state", {"blocks": parameter}, optimizer, step=step, settings={}, log=[])

    save(1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    with torch.no_grad():
        parameter[0] = torch.inf
    with pytest.raises(InputError, match=r"blocks holds NaN or infinity after step 2, .*keeps the one before"):
        save(2)
    assert {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()} == before


def test_a_model_that_holds_nan_is_named(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n")
    match = r"the loss is nan at step 1: model\.layers\.1\.mlp\.up_proj\S+ itself holds NaN; the model itself is broken"
    with pytest.raises(InputError, match=match):
        train(model, tmp_path / "text.txt", tmp_path / "a", num_blocks=4, max_steps=2)
