"""What this machine has: processor, memory, GPUs, programs, Python packages; asked of the system, nothing imported.

The standard library alone, so that it answers where packages are missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# as the kernel spells them: what the kernels, onnxruntime and torch have code for
_INSTRUCTIONS = {
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
}  # fmt: skip
# program → what it is for, and the arguments that make it say its version
TOOLS = {
    "cmake": ("builds the kernels", "--version"),
    "c++": ("builds the kernels", "--version"),
    "nvcc": ("builds the CUDA kernels", "--version"),
    "node": ("runs exports for the web", "--version"),
}
_VERSION = re.compile(r"\d+\.\d+(?:\.\d+)*")
# installed beside this package's own dependencies, and worth knowing of
_NEIGHBOURS = ("peft", "optimum-onnx", "onnxruntime-directml", "onnxruntime-openvino")


def hardware() -> dict[str, Any]:
    """System, processor, memory and disk; sizes in bytes, None where the system does not say."""
    disk = shutil.disk_usage(Path.cwd())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "c_library": " ".join(platform.libc_ver()).strip() or None,
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": cores,
        "instructions": _instructions(),
        "memory": _memory("MemTotal"),
        "memory_free": _memory("MemAvailable"),
        "disk_free": disk.free,
        "disk": str(Path.cwd()),
    }


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs: `name`, `memory` in bytes, `driver`, `compute`; none where nvidia-smi is not there or fails."""
    fields = "name,memory.total,driver_version,compute_cap"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    found = []
    for line in (text or "").splitlines():
        name, memory, driver, compute = (part.strip() for part in line.split(",", 3))
        size = int(memory) << 20 if memory.isdigit() else None
        found.append({"name": name, "memory": size, "driver": driver, "compute": compute})
    return found


def python() -> dict[str, Any]:
    """The Python that runs this."""
    inside = sys.prefix != sys.base_prefix
    return {"version": platform.python_version(), "executable": sys.executable, "virtual_environment": inside}


def tool(name: str) -> dict[str, Any]:
    """A program: `path` and `version`, None where it is not there or does not say; and what it is `for`."""
    purpose, argument = TOOLS[name]
    command = os.environ.get("CXX", name) if name == "c++" else name
    path = shutil.which(command) or (shutil.which("g++") or shutil.which("clang++") if name == "c++" else None)
    text = _output(path, argument) if path else None
    said = max(_VERSION.findall(text or ""), key=len, default=None)  # nvcc says the release before the whole version
    return {"name": name, "path": path, "version": said, "for": purpose}


def packages() -> list[dict[str, Any]]:
    """Dependencies of this package and some neighbours: `name`, `version` or None, `minimum` or None, `extras`.

    `extras` are those that bring it; an empty list means that every installation has it. Read from the metadata of
    the installed package; from a checkout that is not installed only the neighbours come.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in _requirements():
        requirement, _, marker = line.partition(";")
        name, minimum = re.match(r"([\w.-]+)[^<>=]*(?:>=\s*([\w.]+))?", requirement.strip()).groups()  # type: ignore[union-attr]
        extra = re.search(r"extra == ['\"]([\w-]+)", marker)
        if extra and extra[1] == "dev":
            continue
        entry = found.setdefault(name, {"name": name, "version": version(name), "minimum": minimum, "extras": []})
        if extra:
            entry["extras"].append(extra[1])
    for name in _NEIGHBOURS:
        if name not in found and version(name):
            found[name] = {"name": name, "version": version(name), "minimum": None, "extras": None}
    return list(found.values())


def version(package: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def older(version: str, minimum: str) -> bool:
    """Whether a version is below another, by their leading numbers."""
    numbers = [[int(n) for n in re.findall(r"\d+", re.split(r"[^\d.]", each)[0])] for each in (version, minimum)]
    width = max(map(len, numbers))
    return numbers[0] + [0] * (width - len(numbers[0])) < numbers[1] + [0] * (width - len(numbers[1]))


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("diablo-export") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _cpuinfo(field: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    line = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return line[1].strip() if line else None


def _processor() -> str | None:
    return _cpuinfo("model name") or _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or None


def _instructions() -> list[str] | None:
    flags = _cpuinfo("flags") or _cpuinfo("Features")  # x86, ARM
    return sorted(_INSTRUCTIONS & set(flags.split())) if flags else None


def _memory(field: str) -> int | None:
    """From /proc/meminfo, or what the control group of a container leaves of it."""
    try:
        line = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    size = int(line[1]) << 10 if line else None
    limit, used = (_number(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if size is None or limit is None:
        return size
    return min(size, limit if field == "MemTotal" else max(limit - (used or 0), 0))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not there, fails, or takes longer than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
