"""The verb `doctor`: what this machine has, what is broken, in conflict or missing, and what to do about it.

Heavy packages are known by their metadata alone. onnxruntime and the kernel library are tried in a process of their own
(`kernel_check`), which a damaged library may take down.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diablo_export import __version__, machine

FORMAT_VERSION = 1
BROKEN, CONFLICT, MISSING = "broken", "conflict", "missing"
_TOLERANCE = 1e-4  # of the check's numbers near 3: a right sum in float32 is off by 1e-6, a wrong one by about 1
_PATIENCE = 120  # seconds for the check, which takes half of one
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_FOR = {
    "train": "training, exports of Hugging Face models, parity",
    "genai": "the fastest graphs for decoders",
    "cpu": "running and checking exports",
    "gpu": "running exports on an NVIDIA GPU",
}

Problem = dict[str, str]


def doctor() -> dict[str, Any]:
    """Look at this machine.

    Returns:
        `verdict` (`ok`, or `broken` when something that is installed does not work), `versions` of this program and of
        Python, `hardware`, `gpus`, `packages`, `onnxruntime`, `kernels`, `tools`, and `problems`: each with its
        `kind` (`broken`, `conflict` or `missing`), `what` it is and the `fix`, a command where there is one.
    """
    with ThreadPoolExecutor() as pool:
        gpus, checked = pool.submit(machine.gpus), pool.submit(_check)
        tools = list(pool.map(machine.tool, machine.TOOLS))
    report = {
        "format_version": FORMAT_VERSION,
        "verdict": "ok",
        "diablo-export": __version__,
        "python": machine.python(),
        "hardware": machine.hardware(),
        "gpus": gpus.result(),
        "packages": machine.packages(),
        **checked.result(),
        "tools": tools,
    }
    problems = list(_problems(report))
    order = (BROKEN, CONFLICT, MISSING)
    report["problems"] = sorted(problems, key=lambda problem: order.index(problem["kind"]))
    report["verdict"] = "broken" if any(problem["kind"] == BROKEN for problem in problems) else "ok"
    return report


def _check() -> dict[str, Any]:
    """Run `kernel_check`; returns its findings as `onnxruntime` and `kernels`."""
    command = [sys.executable, "-m", "diablo_export.kernel_check"]
    # the package that runs here, installed or not
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    error = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, env=environment)
        lines, complaint = done.stdout.splitlines(), done.stderr.strip().splitlines()
        if done.returncode < 0:
            error = f"the process that tried it was ended by {signal.Signals(-done.returncode).name}"
        elif done.returncode:
            error = complaint[-1] if complaint else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        lines, error = (expired.stdout or b"").decode().splitlines(), f"no answer within {_PATIENCE} s"
    found: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # onnxruntime prints as well, and a line may be cut short
            said = json.loads(line)
            found |= said if isinstance(said, dict) else {}
    error = found.get("error", error)
    runs = "body_error" in found  # up to there it is onnxruntime's doing, from there the library's
    return {
        "onnxruntime": {
            "version": found.get("onnxruntime"),
            "providers": found.get("providers", []),
            "usable": found.get("usable", []),
            "body_error": found.get("body_error"),
            "error": None if runs else error,
        },
        "kernels": {
            "library": found.get("library"),
            "reason": found.get("reason"),
            **{key: found.get("about", {}).get(key) for key in ("version", "isa", "cuda")},
            "max_error": found.get("kernel_error"),
            "error": error if runs else None,
        },
    }


def _problems(report: Mapping[str, Any]) -> Iterator[Problem]:
    packages = {each["name"]: each for each in report["packages"]}
    installed = {name for name, each in packages.items() if each["version"]}
    yield from _of_packages(packages)
    yield from _of_runtimes(report, installed)
    yield from _of_kernels(report["kernels"], report["tools"])
    yield from _of_gpus(report, packages)
    yield from _missing_extras(packages, installed, bool(report["gpus"]))


def _problem(kind: str, what: str, fix: str) -> Problem:
    return {"kind": kind, "what": what, "fix": fix}


def _of_packages(packages: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    for name, each in packages.items():
        wanted = f"{name}>={each['minimum']}" if each["minimum"] else name
        if each["version"] and each["minimum"] and machine.older(each["version"], each["minimum"]):
            what = f"{name} {each['version']} is older than {each['minimum']}"
            yield _problem(BROKEN, what, f'pip install --upgrade "{wanted}"')
        elif not each["version"] and each["extras"] == []:
            yield _problem(BROKEN, f"{name} is not installed; every command needs it", f'pip install "{wanted}"')
    optimum, transformers = (packages.get(name, {}).get("version") for name in ("optimum-onnx", "transformers"))
    if optimum and transformers and not machine.older(transformers, "4.58"):
        what = f"optimum-onnx {optimum} does not work with transformers {transformers}"
        yield _problem(CONFLICT, what, "keep optimum-onnx in an environment of its own, with transformers below 4.58")


def _of_runtimes(report: Mapping[str, Any], installed: set[str]) -> Iterator[Problem]:
    runtime = report["onnxruntime"]
    # whether or not this package asks for them: they share one folder
    several = [name for name in _RUNTIMES if machine.version(name)]
    if len(several) > 1:
        keep = "gpu" if report["gpus"] and "onnxruntime-gpu" in several else "cpu"
        fix = f'pip uninstall -y {" ".join(several)} && pip install "diablo-export[{keep}]"'
        yield _problem(CONFLICT, f"{' and '.join(several)} overwrite each other's files", fix)
    if several and runtime["error"]:
        fix = f"pip install --force-reinstall {several[0]}"
        yield _problem(BROKEN, f"{several[0]} does not work: {runtime['error']}", fix)
    if runtime["body_error"] is not None and not runtime["body_error"] <= _TOLERANCE:
        what = f"onnxruntime {runtime['version']} computes the branch with an error of {runtime['body_error']:.2g}"
        yield _problem(BROKEN, what, f"pip install --force-reinstall {several[0] if several else 'onnxruntime'}")
    if "CUDAExecutionProvider" in set(runtime["providers"]) - set(runtime["usable"]) and report["gpus"]:
        fix = 'pip install "onnxruntime-gpu[cuda,cudnn]", and a driver that is as young'
        yield _problem(CONFLICT, "the CUDAExecutionProvider cannot be used: its libraries do not load", fix)


def _of_kernels(kernels: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    if kernels["error"]:
        named = f"{kernels['library']}: " if (kernels["library"] or "") not in kernels["error"] else ""
        yield _problem(BROKEN, f"kernels: {named}{kernels['error']}", _build_command(tools))
    elif kernels["max_error"]:
        for provider, error in kernels["max_error"].items():
            if not error <= _TOLERANCE:
                what = f"the kernel library {kernels['library']} is wrong by {error:.2g} on the {provider}"
                yield _problem(BROKEN, what, _build_command(tools))
    elif kernels["reason"] and "switched off" not in kernels["reason"]:
        what = f"no kernels ({kernels['reason']}): branches run as standard operators, more slowly"
        yield _problem(MISSING, what, _build_command(tools))


def _build_command(tools: Sequence[Mapping[str, Any]]) -> str:
    """What builds the library here: in a checkout with CMake, otherwise with pip from the source distribution."""
    there = {tool["name"] for tool in tools if tool["path"]}
    first = "" if "c++" in there else "install a C++ compiler (Debian, Ubuntu: sudo apt install g++ make), then: "
    if (Path(__file__).resolve().parent.parent / "kernels" / "CMakeLists.txt").is_file():
        cmake = "" if "cmake" in there else "pip install cmake && "
        return f"{first}{cmake}cmake -S kernels -B kernels/build && cmake --build kernels/build"
    pip = "pip install --force-reinstall --no-deps --no-binary diablo-export"
    return f"{first}DIABLO_KERNELS_BUILD=require {pip} diablo-export=={__version__}"


def _of_gpus(report: Mapping[str, Any], packages: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    if not report["gpus"]:
        return
    torch = packages.get("torch", {}).get("version") or ""
    if torch.endswith("+cpu"):
        what = f"torch {torch} is built for the CPU; there is a GPU"
        yield _problem(CONFLICT, what, "pip install --force-reinstall torch, from the index that pytorch.org names")
    runtime = report["onnxruntime"]
    if runtime["version"] and "CUDAExecutionProvider" not in runtime["providers"]:
        what = f"onnxruntime {runtime['version']} is built for the CPU; there is a GPU"
        yield _problem(CONFLICT, what, 'pip uninstall -y onnxruntime && pip install "diablo-export[gpu]"')


def _missing_extras(packages: Mapping[str, Mapping[str, Any]], installed: set[str], has_gpu: bool) -> Iterator[Problem]:
    absent: dict[str, list[str]] = {}
    for name, each in packages.items():
        for extra in [] if each["version"] else each["extras"] or []:
            absent.setdefault(extra, []).append(name)
    if any(name in installed for name in _RUNTIMES):  # one is enough
        absent = {extra: names for extra, names in absent.items() if extra not in ("cpu", "gpu")}
    elif absent:
        absent.pop("cpu" if has_gpu else "gpu", None)
    for extra, names in absent.items():
        purpose = f", for {_FOR[extra]}" if extra in _FOR else ""
        verb = "is" if len(names) == 1 else "are"
        what = f"{', '.join(names)} {verb} not installed{purpose}"
        yield _problem(MISSING, what, f'pip install "diablo-export[{extra}]"')
