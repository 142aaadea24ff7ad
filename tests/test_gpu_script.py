"""`make gpu` where there is no GPU: that it says so, and that its scripts run at all, on the CPU and small."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "kernels" / "gpu" / "run.py"


def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """With one thread: these are tests of scripts, beside others."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = started(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "make gpu: no CUDA device: torch" in done.stderr and "nothing was run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_kit_without_libraries_is_refused(tmp_path: Path) -> None:
    done = started("--device", "cpu", "--kit", str(tmp_path))
    assert done.returncode == 2
    assert "has no libdiablo_kernels_c.so and no libdiablo_kernels_ort.so" in done.stderr


@pytest.mark.slow
def test_the_scripts_run_on_the_cpu(tmp_path: Path, library: Path) -> None:
    plain = library.with_name("libdiablo_kernels_c.so")
    if not plain.is_file():
        pytest.skip("a build from before there was a plain library, or one without tests")
    done = started("--device", "cpu", "--small", "--kit", str(library.parent), "--output", str(tmp_path))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, (done.stdout, report["missed"])
    parts = report["parts"]
    assert list(parts) == ["numbers", "speed", "training", "sessions"]
    worst = parts["numbers"]["worst"]
    assert parts["numbers"]["calls"] == 40 and 0 < max(worst.values()) <= 1
    if library.with_name("libdiablo_kernels_emulated.so").is_file():
        assert {"int4 fp16", "int4 bf16", "dense fp16", "dense bf16"} <= worst.keys()
        assert [one["layer"] for one in parts["speed"]["int4"]] == ["q", "k", "v", "down", "q+k+v"]
    timed = {(one["layer"], one["rows"]) for one in parts["sessions"]["layers"]}
    assert timed == {(layer, m) for layer in ("q", "k", "v", "down", "q+k+v", "q, zero points") for m in (1, 8)}
    assert all(one["held"] for one in report["figures"]) and report["figures"]
    assert {"diablo", "diablo int4", "einsum", "lora"} <= parts["training"]["kinds"].keys()
    text = (tmp_path / "gpu.md").read_text()
    assert "| branch | q | 1 |" in text and "| diablo int4 |" in text and "| at most 1 | met |" in text


def test_limits_are_named(script: Any) -> None:
    kind = {"tokens_per_second": 100.0, "peak_bytes": 10}
    report = {
        "machine": {"device": "some GPU"},
        "parts": {
            "numbers": {"worst": {"fp16": 1.5, "fp32": 0.5}},
            "memcheck": {"failed": "exit code 99"},
            "racecheck": {},
            "speed": {"branch": [{"layer": "q", "rows": 1, "ratio": 1.4}, {"layer": "q", "rows": 16, "ratio": 9}]},
            "sessions": {"layers": [{"layer": "k", "rows": 512, "ratio": {"fused": 1.04, "lora": 1.02}}]},
            "training": {
                "kinds": {"diablo": kind, "lora": {**kind, "peak_bytes": 9}, "einsum": kind, "diablo int4": kind},
                "not_installed": ["bitsandbytes"],
            },
        },
    }
    found = script.figures(report)
    assert [str(one) for one in found if not one.held] == [
        "memcheck: exit code 99",
        "error over what is allowed, fp16: 1.5, wanted at most 1",
        "branch q, 1 row, time over its floor: 1.4, wanted at most 1.3",
        "int4 k, 512 rows, time over MatMulNBits alone: 1.04, wanted at most 1.03",
        "int4 k, 512 rows, time over MatMulNBits and LoRA: 1.02, wanted at most 1",
        "training, tokens a second of diablo over lora: 1, wanted at least 1.1",
        "training, memory of diablo over lora: 1.11, wanted at most 1",
        "training, tokens a second of diablo over einsum: 1, wanted at least 1.3",
        "training, diablo int4 over qlora nf4: not measured; not installed: bitsandbytes",
    ]
    assert [one.name for one in found if one.held] == [
        "error over what is allowed, fp32",
        "compute-sanitizer racecheck, errors",
        "training, memory of diablo over einsum",
    ]
    report["machine"] = {}
    assert [one.name for one in script.figures(report) if not one.held] == [
        "memcheck",
        "error over what is allowed, fp16",
    ]


def test_what_fails_within_a_part_is_named_and_the_rest_goes_on(script: Any) -> None:
    steps, correctness = (importlib.import_module(name) for name in ("steps", "correctness"))
    times = list(steps.in_turns({"a": iter([1.0, 2.0, 3.0]).__next__, "b": iter([4.0, 5.0, 6.0]).__next__}, 3))
    assert times[-1] == {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}
    order: list[str] = []
    kinds = {name: lambda name=name: order.append(name) or 0.0 for name in "abc"}
    list(steps.in_turns(kinds, 3))
    assert "".join(order) == "abcbcacab"

    found: dict[str, Any] = {"worst": {}, "worst_at": {}}
    answers = iter([(0.5, "first"), (1.5, "second"), (0.7, "third")])
    for _ in range(3):
        correctness.compare(found, "fp16", lambda: next(answers))
    correctness.compare(found, "bf16", lambda: 1 / 0)
    correctness.compare(found, "bf16", pytest.fail)  # a kernel that CUDA refuses is not asked again
    assert found["worst"] == {"fp16": 1.5, "bf16": float("inf")} and found["worst_at"] == {"fp16": "second"}
    assert found["failed"] == "bf16: ZeroDivisionError: division by zero"
    wrong = [one.name for one in script.figures({"machine": {}, "parts": {"numbers": found}}) if not one.held]
    assert wrong == ["numbers", "error over what is allowed, fp16 (second)", "error over what is allowed, bf16"]


def test_writing_beside_an_output_is_an_error(script: Any) -> None:
    correctness = importlib.import_module("correctness")
    memory = torch.full((3 * 6,), float("nan"))
    y = memory.view(3, 6)[:, :4].fill_(1.0)
    assert correctness.error_of(y, y.double(), torch.float32) == 0
    memory[4] = 0.0  # between two rows
    assert correctness.error_of(y, y.double(), torch.float32) == float("inf")


def test_a_part_that_hangs_or_dies_is_reported(script: Any) -> None:
    slow = "import os, time; print('{\"a\": 1}'); print('{\"a\": 2}\\n{\"a\"', end=''); os.fork(); time.sleep(60)"
    cut = script.run([sys.executable, "-c", slow], 1)  # with what it had found, and what it started is gone too
    assert cut["failed"] == "not done after 1 s" and cut["a"] == 2 and cut["seconds"] < 30
    died = script.run([sys.executable, "-c", "print('{\"a\": 1}'); raise SystemExit(3)"], 60)
    assert died["a"] == 1 and died["failed"] == "exit code 3"


def test_a_part_can_be_run_again_alone(tmp_path: Path, library: Path) -> None:
    if not library.with_name("libdiablo_kernels_c.so").is_file():
        pytest.skip("a build from before there was a plain library, or one without tests")
    common = ["--device", "cpu", "--small", "--kit", str(library.parent), "--output", str(tmp_path)]
    assert started(*common, "--only", "speeds").returncode == 2
    assert started(*common, "--only", "racecheck").returncode == 0  # not on a CPU
    done = started(*common, "--only", "speed", "--seconds", "0")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 1 and report["parts"]["speed"]["failed"] == "no time was left"
    report["parts"]["numbers"] = {"worst": {"fp16": 0.5}}
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    started(*common, "--only", "speed", "--seconds", "0")
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"].keys() == {"numbers", "speed"}
