"""Where the tools for the tests of other runtimes are: npm packages, a browser, a compiler, an environment for optimum.

`make test-runtimes` puts them into build/runtimes. A test whose tools are absent skips and says what would bring them,
unless DIABLO_RUNTIMES names them (npm, kernels, compiler, genai, optimum, with commas between, or all): then it fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diablo_export import runtime

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
PLACE = ROOT / "build" / "runtimes"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def need(tool: str, there: object, how: str) -> None:
    """Skip, or fail where the tool is promised, unless it is there."""
    if there:
        return
    promised = os.environ.get("DIABLO_RUNTIMES", "").split(",")
    message = f"{tool} not found; {how}"
    if tool in promised or "all" in promised:
        pytest.fail(message)
    pytest.skip(message)


def npm(package: str = "") -> Path:
    """The folder with node_modules; node 20 or later must be on the path."""
    how = "install node 20 or later, then: make npm"
    need("npm", shutil.which("node") and (PLACE / "node_modules" / (package or ".ready")).exists(), how)
    return PLACE


def node(script: str, *arguments: object, **environment: str) -> Any:
    """Run one of the scripts beside this file; returns what it prints, read as JSON."""
    command = ["node", str(HERE / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=npm(), env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def browser(folder: Path, **job: Any) -> Any:
    """Run browser.mjs: in the browser that CHROME names or the machine has, else in the one from npm."""
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:  # that one is for Linux on x86-64
        npm("@sparticuz/chromium")
        need("npm", sys.platform == "linux", "install Chromium or Chrome, or name it in the variable CHROME")
    unpacked = PLACE / "tmp"  # of the browser's archive, 200 MB
    unpacked.mkdir(exist_ok=True)
    environment = {"TMPDIR": str(unpacked)} | ({"CHROME": found} if found else {})
    return node("browser.mjs", ROOT, folder, json.dumps(job), **environment)


def optimum() -> Path:
    """The Python of the environment with optimum."""
    python = PLACE / "optimum" / "bin" / "python"
    need("optimum", (PLACE / "optimum" / ".ready").is_file(), "run: make optimum")
    return python


def genai() -> Any:
    """The module onnxruntime_genai."""
    need("genai", importlib.util.find_spec("onnxruntime_genai"), 'install it: pip install "diablo-export[genai]"')
    return importlib.import_module("onnxruntime_genai")


def compiler() -> str:
    """A C++ compiler."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    need("compiler", found, "install g++ or clang++")
    return str(found)


def kernels() -> Path:
    """The kernel library."""
    found = runtime.find_library()
    need("kernels", found, runtime.LIBRARY_HELP)
    return Path(str(found))
