"""What a machine has: asked of the real one, and of programs that say what nvidia-smi and nvcc say."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import tomllib
from pathlib import Path

import pytest
from numpy._core._multiarray_umath import __cpu_features__ as numpy_sees  # type: ignore[attr-defined]

from diablo_export import machine

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("version", "minimum", "below"),
    [
        ("1.9", "1.23", True),
        ("1.23", "1.23", False),
        ("1.23.0", "1.23", False),
        ("1.23", "1.23.1", True),
        ("2.13.0+cpu", "2.6", False),
        ("5.0.0rc1", "5.0", False),
        ("10", "9.9", False),
    ],
)
def test_versions_are_numbers(version: str, minimum: str, below: bool) -> None:
    assert machine.older(version, minimum) is below


def test_hardware_is_this_machine_s() -> None:
    found = machine.hardware()
    assert found["architecture"] == platform.machine() and found["cores"] >= 1
    assert 0 < found["memory_free"] <= found["memory"] and found["disk_free"] > 0
    for ours, theirs in (("avx2", "AVX2"), ("avx512f", "AVX512F"), ("asimd", "ASIMD")):
        assert (ours in found["instructions"]) == numpy_sees.get(theirs, False)


def test_packages_are_those_that_are_declared() -> None:
    found = {each["name"]: each for each in machine.packages()}
    assert found["numpy"] == {
        "name": "numpy", "version": importlib.metadata.version("numpy"), "minimum": "1.26", "extras": [],
    }  # fmt: skip
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanting = [extra for extra, needs in declared.items() if any(re.match(r"torch\b", need) for need in needs)]
    assert found["torch"]["extras"] == wanting and len(wanting) > 1
    assert found["onnxruntime-gpu"]["extras"] == ["gpu"]
    assert "pytest" not in found  # of the developers' extra


def program(folder: Path, name: str, output: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    file.chmod(0o755)


def test_programs_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.delenv("CXX", raising=False)
    program(
        tmp_path, "nvcc", "nvcc: NVIDIA (R) Cuda compiler driver\nCopyright (c) 2005-2025 NVIDIA Corporation\n"
        "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0",
    )  # fmt: skip
    assert machine.tool("nvcc")["version"] == "13.0.88"
    program(tmp_path, "nvidia-smi", "NVIDIA A10, 23028, 570.86.15, 8.6\nJetson, [N/A], 540.4.0, 8.7")
    assert machine.gpus() == [
        {"name": "NVIDIA A10", "memory": 23028 << 20, "driver": "570.86.15", "compute": "8.6"},
        {"name": "Jetson", "memory": None, "driver": "540.4.0", "compute": "8.7"},
    ]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho driver and library versions differ\nexit 18\n")
    assert machine.gpus() == []


def test_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for name in machine.TOOLS:
        found = machine.tool(name)
        assert found["path"] is None and found["version"] is None and found["for"]
    assert machine.gpus() == []
