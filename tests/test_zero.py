"""DeepSpeed's ZeRO: the weights of one process, also killed and resumed; and what of its configuration is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export.adapter import Adapter
from diablo_export.errors import DependencyError, InputError
from diablo_export.trainer.train import train
from diablo_export.trainer.zero import check_config, read_config
from tests.test_processes import RUN, run_forks

INSTALLED = importlib.util.find_spec("deepspeed") is not None
SPREAD = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason='needs DeepSpeed: pip install "diablo-export[deepspeed]"')
def test_spread_optimizers_come_to_the_weights_of_one(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 12}) + "\n")
    common = {"model": str(tiny_model("llama")), "data": str(text), **RUN}
    # a file for `accelerate launch`; sizes of steps and clipping are the trainer's all the same
    config = {
        "train_batch_size": "auto", "gradient_accumulation_steps": 7, "gradient_clipping": 1e-3,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5000, "overlap_comm": False},
    }  # fmt: skip
    (tmp_path / "zero.json").write_text(json.dumps(config))
    by_file = SPREAD | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}
    by_option = SPREAD | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}

    def run(name: str, count: int, environment: dict[str, str], **more: Any) -> dict[str, Any]:
        arguments = {**common, "output": str(tmp_path / name), "resume": True}
        return {"count": count, "arguments": arguments, "environment": environment, **more}

    runs = [
        run("one-by-option", 2, by_option),
        run("two-by-file", 2, by_file, kill_after=3),
        run("two-by-file", 3, by_file, kill_after=6),
        run("two-by-file", 2, {}),
    ]
    run_forks("together", tmp_path, runs=runs, log=str(tmp_path / "log"))
    train(**{**common, "output": tmp_path / "one"})
    expected = Adapter.load(tmp_path / "one")
    for name in ("one-by-option", "two-by-file"):
        for module, own in expected.modules.items():
            found = Adapter.load(tmp_path / name).modules[module]
            # as tests/test_processes.py has it: rounding of small gradients, which AdamW divides by their size
            np.testing.assert_allclose(found.blocks, own.blocks, rtol=0, atol=1e-4 * abs(own.blocks).max())
    assert "continuing after step 2 of 8" in (tmp_path / "log.2.0").read_text()


def test_what_would_train_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"zero_optimization": {"stage": 2}}
    check_config({**section, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "train_batch_size": 5})
    with pytest.raises(InputError) as raised:
        check_config({
            "optimizer": {"type": "Lamb"}, "bf16": {"enabled": True},
            "zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}},
        })  # fmt: skip
    lines = str(raised.value).splitlines()
    wanted = ["optimizer: steps are", "bf16: steps are", "stage is 0; it must be 1 or 2", "offload_optimizer: not supp"]
    assert len(lines) == 4 and all(part in line for part, line in zip(wanted, lines, strict=True))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(InputError, match=r"accelerate cannot read its DeepSpeed configuration: .*nowhere\.json"):
        read_config()


@pytest.mark.skipif(INSTALLED, reason="says what to do where DeepSpeed is not installed")
def test_the_extra_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    with pytest.raises(DependencyError, match=r"diablo-export\[deepspeed\]"):
        read_config()
