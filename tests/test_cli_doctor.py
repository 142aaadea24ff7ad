"""diablo-export doctor, each time in a process of its own: on this machine, and on worse ones."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from diablo_export import runtime

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "numpy"]


def doctor(*arguments: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "COLUMNS": "80", **environment}
    command = [python, "-c", "from diablo_export.cli import main; main()", "doctor", *arguments]
    # from elsewhere: python -c looks into the current folder first, and a checkout may hold metadata
    return subprocess.run(command, capture_output=True, text=True, env=given, cwd=tempfile.gettempdir())


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def said(parsed: dict[str, Any], kind: str) -> str:
    return "\n".join(f"{each['what']} → {each['fix']}" for each in parsed["problems"] if each["kind"] == kind)


def test_text_fits_eighty_columns() -> None:
    done = doctor()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    groups = [line for line in lines if line and not line.startswith(" ")]
    assert groups[:5] == ["Machine", "Packages", "ONNX Runtime", "Kernels", "Programs"]
    # commands are left whole, to be copied
    assert max(len(line) for line in lines if not line.startswith("    ")) <= 80
    assert "largest error" in done.stdout


def test_json_names_what_is_there(library: Path) -> None:
    found = report(doctor("--json"))
    assert found["verdict"] == "ok" and found["format_version"] == 1
    assert found["python"]["executable"] == sys.executable
    versions = {each["name"]: each["version"] for each in found["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert found["onnxruntime"]["version"] == importlib.metadata.version("onnxruntime")
    assert "CPUExecutionProvider" in found["onnxruntime"]["usable"]
    # float32 sums of 16 products near 1
    assert found["onnxruntime"]["body_error"] < 1e-5 and found["kernels"]["max_error"]["CPUExecutionProvider"] < 1e-5
    assert found["kernels"]["library"] == str(library) and found["kernels"]["error"] is None
    assert {key: found["kernels"][key] for key in ("version", "isa", "cuda")} == {
        key: runtime.describe_library(library).get(key) for key in ("version", "isa", "cuda")
    }


def test_it_imports_nothing_heavy_itself() -> None:
    code = (
        "import sys\nfrom diablo_export.cli import main\nmain(['doctor'], standalone_mode=False)\n"
        f"print('heavy:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


@pytest.mark.parametrize("kind", ["text", "cut short", "gone"])
def test_a_library_that_does_not_load(kind: str, library: Path, tmp_path: Path) -> None:
    """Cut short it takes the process down that loads it, which must not be the one that reports."""
    file = tmp_path / "kernels.so"
    if kind != "gone":
        file.write_bytes(b"not a library" if kind == "text" else library.read_bytes()[:100_000])
    done = doctor("--json", DIABLO_KERNELS=str(file))
    start = "DIABLO_KERNELS=" if kind == "gone" else ""
    assert done.returncode == 1 and f"error: kernels: {start}{file}: " in done.stderr
    found = report(done)
    assert found["verdict"] == "broken" and found["onnxruntime"]["error"] is None
    assert "cmake --build kernels/build" in said(found, "broken")
    reason = {"text": "cannot be loaded as a library: ", "cut short": "was ended by SIG", "gone": "no such file"}[kind]
    assert reason in found["kernels"]["error"]


def test_a_library_with_wrong_numbers(library: Path, tmp_path: Path) -> None:
    """The real library, but for a core that computes nothing."""
    core, compiler = library.with_name("libdiablo_kernels.a"), shutil.which("c++")
    if compiler is None or not core.is_file():
        pytest.skip("needs a C++ compiler and kernels/build")
    idle = tmp_path / "idle.cc"
    idle.write_text(
        '#include "diablo/block_diag.h"\n'
        'extern "C" DiabloError __wrap_diablo_block_diag_cpu(const DiabloShape*, const void*, const void*,\n'
        "    const float*, const void*, void*, const DiabloParallelFor*, DiabloIsa) { return DIABLO_OK; }\n"
    )
    sources = [str(idle), *map(str, (ROOT / "kernels/ort").glob("*.cc")), str(core)]
    options = ["-std=c++17", "-shared", "-fPIC", '-DDIABLO_VERSION="0"', f"-I{ROOT}/kernels/include"]
    wrong = tmp_path / "wrong.so"
    wrap = "-Wl,--wrap=diablo_block_diag_cpu"
    subprocess.run([compiler, *options, f"-I{ROOT}/kernels/ort", *sources, wrap, "-o", str(wrong)], check=True)
    done = doctor("--json", DIABLO_KERNELS=str(wrong))
    assert done.returncode == 1
    assert f"the kernel library {wrong} is wrong by" in said(report(done), "broken")
    assert report(done)["onnxruntime"]["body_error"] < 1e-5


def test_a_library_that_registers_nothing_and_prints(tmp_path: Path) -> None:
    """Where no kernel takes its place, the check's function body leaves the blocks out."""
    compiler, file = shutil.which("cc"), tmp_path / "empty.so"
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "empty.c").write_text(
        '#include <stdio.h>\nvoid* RegisterCustomOps(void* o, void* b) { puts("{1"); fflush(stdout); return 0; }\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(file), str(tmp_path / "empty.c")], check=True)
    done = doctor("--json", DIABLO_KERNELS=str(file))
    assert done.returncode == 1 and f"the kernel library {file} is wrong by" in said(report(done), "broken")


def test_kernels_switched_off() -> None:
    found = report(doctor("--json", DIABLO_KERNELS="off"))
    assert found["verdict"] == "ok" and found["kernels"]["library"] is None
    assert found["kernels"]["reason"] == "switched off by DIABLO_KERNELS=off"
    assert "kernel" not in said(found, "missing")  # on purpose, so nothing is missing


def installed(folder: Path, name: str, version: str, more: str = "") -> None:
    """What pip leaves of a package that is installed there, for importlib.metadata to find."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")


def test_packages_that_do_not_go_together(tmp_path: Path) -> None:
    installed(tmp_path, "onnxruntime-gpu", "1.31.0")
    installed(tmp_path, "optimum-onnx", "0.1.0")
    done = doctor("--json", PYTHONPATH=str(tmp_path))
    conflicts = said(report(done), "conflict")
    assert done.returncode == 0, done.stdout  # they lie badly, and work
    assert "onnxruntime and onnxruntime-gpu overwrite each other's files → pip uninstall -y" in conflicts
    assert "optimum-onnx 0.1.0 does not work with transformers 5." in conflicts


def test_a_gpu_that_nothing_uses(tmp_path: Path) -> None:
    """nvidia-smi is what says so; here a program that says what it says on a machine with one."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built for GPUs")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034, 570.86.15, 8.9'\n")
    smi.chmod(0o755)
    found = report(doctor("--json", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}"))
    assert [gpu["name"] for gpu in found["gpus"]] == ["NVIDIA L4"] and found["verdict"] == "ok"
    assert f"onnxruntime {onnxruntime.__version__} is built for the CPU; there is a GPU → pip uninstall" in said(
        found, "conflict"
    )


def test_packages_that_are_too_old(tmp_path: Path) -> None:
    installed(tmp_path, "onnxruntime", "1.10.0")
    installed(tmp_path, "transformers", "4.40.0")
    done = doctor("--json", PYTHONPATH=str(tmp_path))
    broken = said(report(done), "broken")
    assert done.returncode == 1
    assert 'onnxruntime 1.10.0 is older than 1.23 → pip install --upgrade "onnxruntime>=1.23"' in broken
    assert "transformers 4.40.0 is older than 5.21" in done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A new environment, and a folder of what click and rich need: everything else is absent."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    packages = folder / "packages"
    packages.mkdir()
    for name in ("click", "rich", "pygments", "markdown-it-py", "mdurl"):
        distribution = importlib.metadata.distribution(name)
        tops = {Path(str(file)).parts[0] for file in distribution.files or [] if not str(file).startswith("..")}
        for top in tops:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    (packages / "diablo_export").symlink_to(ROOT / "diablo_export")
    return str(folder / "venv" / "bin" / "python"), packages


def test_a_checkout_without_packages(bare: tuple[str, Path]) -> None:
    python, packages = bare
    done = doctor(python=python, PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stderr
    assert "this is a checkout that is not installed" in done.stdout and "No module named 'numpy'" in done.stdout


def test_an_installation_without_its_dependencies(bare: tuple[str, Path], tmp_path: Path) -> None:
    python, packages = bare
    needs = "".join(f"Requires-Dist: {each}\n" for each in importlib.metadata.requires("diablo-export") or [])
    installed(tmp_path, "diablo-export", "0.1.0", needs)
    done = doctor("--json", python=python, PYTHONPATH=f"{packages}{os.pathsep}{tmp_path}")
    found = report(done)
    assert done.returncode == 1
    assert 'numpy is not installed; every command needs it → pip install "numpy>=' in said(found, "broken")
    assert "click" not in said(found, "broken")
    missing = said(found, "missing")
    assert (
        'onnxruntime is not installed, for running and checking exports → pip install "diablo-export[cpu]"' in missing
    )
    assert "torch" in missing and 'pip install "diablo-export[train]"' in missing
    assert "onnxruntime-gpu" not in missing  # there is no GPU, or it is the one that is named
