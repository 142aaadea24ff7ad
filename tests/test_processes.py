"""Training as several processes, and killed: the weights are those of one process that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export.adapter import Adapter
from diablo_export.errors import InputError
from diablo_export.trainer.processes import Processes, join_processes
from diablo_export.trainer.train import train

# batches of 3 over two epochs, the last ones smaller than the number of processes; llama: no dropout
RUN: dict[str, Any] = {
    "num_blocks": 4, "lr": 0.02, "max_steps": 8, "batch_size": 3, "grad_accumulation": 2, "max_length": 16,
    "eval_fraction": 0.1, "eval_every": 4, "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    file.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 12}) + "\n")
    return file


def run_forks(kind: str, folder: Path, **arguments: Any) -> None:
    (folder / "forks.json").write_text(json.dumps(arguments))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.forks", kind, str(folder / "forks.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    logs = "".join(f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("log*")))
    assert done.returncode == 0, f"{done.stderr}\n{logs}"


@pytest.mark.slow
def test_two_processes_and_kills_and_other_numbers_come_to_the_weights_of_one(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    common = {"model": str(tiny_model("llama")), "data": str(text), **RUN}

    def run(name: str, count: int, **more: Any) -> dict[str, Any]:
        return {"count": count, "arguments": {**common, "output": str(tmp_path / name), "resume": True}, **more}

    runs = [
        run("two", 2),
        run("resumed", 2, kill_after=3),
        run("resumed", 3, kill_after=6),
        run("resumed", 1),
        run("sharded", 2, kill_after=5, environment=SHARDED),
        run("sharded", 2, environment=SHARDED),
    ]
    run_forks("together", tmp_path, runs=runs, log=str(tmp_path / "log"))
    one = train(**{**common, "output": tmp_path / "one"})
    expected = Adapter.load(tmp_path / "one")
    for name in ("two", "resumed", "sharded"):
        found = Adapter.load(tmp_path / name)
        for module, own in expected.modules.items():
            # float32 gradients are summed in other orders, and AdamW divides by their size: a weight whose gradient is
            # about its rounding moves elsewhere (one of 1,536 was 5e-4 of the largest off), the others agree to 1e-5 or
            # better. So a module is compared as a whole: 2e-5 was the worst. Other data differ in the first digits
            off = found.modules[module].blocks - own.blocks
            assert np.linalg.norm(off) <= 1e-4 * np.linalg.norm(own.blocks), f"{name}, {module}"
            assert np.mean(abs(off) > 1e-4 * abs(own.blocks).max()) < 0.01, f"{name}, {module}"
        records = [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "loss" in record] == list(range(1, 9))
        held = [record["eval_loss"] for record in records if "eval_loss" in record]
        assert held == pytest.approx([record["eval_loss"] for record in one.evaluations], rel=1e-4)
    assert "step 8 of 8" in (tmp_path / "log.0.0").read_text()
    assert "continuing after step 2 of 8" in (tmp_path / "log.2.0").read_text()
    spoken = (tmp_path / "log.0.1").read_text()
    assert "step" not in spoken and "wrote" not in spoken, "only the first process speaks"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one", "resumed", "sharded", "two"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_to_the_same_bits(
    kills: int, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    arguments = {"model": str(tiny_model("gpt2")), "data": str(text), **RUN, "max_steps": 24, "checkpoint_every": 1}
    began = time.monotonic()
    train(**{**arguments, "output": tmp_path / "reference"})
    longest = time.monotonic() - began
    arguments |= {"output": str(tmp_path / "adapter"), "resume": True}
    reference, log = str(tmp_path / "reference"), str(tmp_path / "log")
    run_forks(
        "killed", tmp_path, arguments=arguments, reference=reference, kills=kills, longest=longest, seed=kills, log=log
    )
    assert not list(tmp_path.glob("*.training")) and not list(tmp_path.glob(".*partial*"))


def test_items_are_shared_out() -> None:
    batch: Any = list("abcde")
    shares = [Processes(rank, 3).share(batch) for rank in range(3)]
    assert shares == [(["a", "d"], 1.0), (["b", "e"], 1.0), (["c"], 1.0)]
    # all go through the model as often as the others
    assert Processes(2, 3).share(batch[:2]) == (["a"], 0.0)
    assert Processes().share(batch) == (batch, 1.0)


@pytest.mark.parametrize(
    ("environment", "batch_size", "message"),
    [
        ({}, 1, "--batch-size is 1, which 2 processes share: give 2 or more"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, 4, "stage is 3.* use FSDP 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, 4, "configured for FSDP 1.*set fsdp_version: 2"),
        (SHARDED, 4, "FSDP 2 does not cut up packed weights: give a float base"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    environment: dict[str, str], batch_size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert join_processes("cpu", 1) == Processes()
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        join_processes("cpu", batch_size, packed=True)
