"""Builds the package with setuptools, and the kernel library in this folder with CMake where that is possible.

The environment variable DIABLO_KERNELS_BUILD says what to do about the kernels:

    auto     (default) build them where there is a C++ compiler; where not, say why and make a pure Python wheel
    require  build them or fail
    off      leave them out

CMAKE_ARGS holds further arguments of CMake; CUDA kernels are built only where they are asked for there, with
`-DDIABLO_CUDA=ON`.

The library links no Python, so one wheel, tagged py3-none-<platform>, serves every version of it. Only the hook
`get_requires_for_build_wheel` differs from setuptools' own: CMake and ninja come from the package registry where the
machine has a compiler but not them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Command
from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  the hooks that stay as they are
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.egg_info import manifest_maker
from setuptools.command.install import install

VARIABLE = "DIABLO_KERNELS_BUILD"
SOURCE = Path(__file__).parent
FOLDER = Path("diablo_export", "kernels")  # in the wheel; diablo_export.runtime looks there
NOTE = "not_built.txt"  # in a pure wheel: why; read by `diablo-export doctor`
_COMPILERS = ("c++", "g++", "clang++")

manifest_maker.template = "kernels/MANIFEST.in"  # setuptools knows no setting for it


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """What pip installs before it builds: CMake and something that it can drive, unless they are here."""
    needed: list[str] = _setuptools.get_requires_for_build_wheel(config_settings)
    if _hindrance() is None:
        needed += [] if shutil.which("cmake") else ["cmake>=3.22"]
        needed += [] if shutil.which("make") or shutil.which("ninja") else ["ninja"]
    return needed


def _wish() -> str:
    """What DIABLO_KERNELS_BUILD asks for."""
    wish = os.environ.get(VARIABLE) or "auto"
    if wish not in ("auto", "require", "off"):
        raise SystemExit(f"{VARIABLE}={wish}: must be auto, require or off")
    return wish


def _hindrance() -> str | None:
    """Why the kernels are not to be built here, as far as it shows without trying; None: build them."""
    wish = _wish()
    if wish == "off":
        return f"asked for with {VARIABLE}=off"
    if not (SOURCE / "CMakeLists.txt").is_file():
        return f"{SOURCE} is missing"
    if sys.platform != "linux" and wish == "auto":
        return f"tried on Linux only, this is {sys.platform}; {VARIABLE}=require builds them all the same"
    if not (os.environ.get("CXX") or any(map(shutil.which, _COMPILERS))):
        return f"no C++ compiler: none of {', '.join(_COMPILERS)} found, and CXX is not set"
    return None


def _build(target: Path) -> str | None:
    """Build the library into `target`; returns None, or why there is none."""
    hindrance = _hindrance()
    if hindrance is None and not shutil.which("cmake"):
        hindrance = "no cmake; pip install cmake"
    if hindrance is not None:
        return hindrance
    # A fresh folder each time: pip's environments, whose tools CMake would remember, are gone at the next build.
    with tempfile.TemporaryDirectory() as work:
        steps = [
            ["cmake", "-S", str(SOURCE), "-B", work, "-DCMAKE_BUILD_TYPE=Release", "-DDIABLO_TESTS=OFF"],
            ["cmake", "--build", work, "--config", "Release", "--parallel", str(os.cpu_count() or 1)],
            ["cmake", "--install", work, "--prefix", str(target), "--strip"],
        ]
        steps[0] += ["-DDIABLO_CUDA=OFF", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        if not shutil.which("make") and shutil.which("ninja"):
            steps[0] += ["-G", "Ninja"]
        for step in steps:
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                print(done.stdout, file=sys.stderr)
                return f"`{' '.join(step[:2])} …` failed with exit code {done.returncode}; its output is above"
    return None


class Build(build):
    """setuptools' own, and the kernels."""

    sub_commands = [*build.sub_commands, ("build_kernels", None)]  # noqa: RUF012


class BuildKernels(Command):
    """The step of `build` that puts the library into the package."""

    description = "build the kernel library with CMake"
    user_options: list[tuple[str, str | None, str]] = []  # noqa: RUF012  setuptools wants it so

    def initialize_options(self) -> None:
        """Set what setuptools fills in."""
        self.build_lib: str | None = None
        self.editable_mode = False  # setuptools sets it; a checkout's kernels/build is found by itself
        self.built: bool | None = None

    def finalize_options(self) -> None:
        """Take the folder that the other steps build into."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Build, or say why not, in the log and in a note beside the missing library."""
        if self.editable_mode or self.built is not None:
            return
        assert self.build_lib is not None
        target = Path(self.build_lib) / FOLDER
        shutil.rmtree(target, ignore_errors=True)  # an earlier build's would slip into a pure wheel
        target.mkdir(parents=True)
        reason = _build(target)
        self.built = reason is None
        if reason is None:
            return
        if _wish() == "require":
            raise SystemExit(f"{VARIABLE}=require: the kernels could not be built: {reason}")
        print(f"diablo-export: pure Python wheel, without kernels: {reason}", file=sys.stderr)
        (target / NOTE).write_text(f"{reason}\n", encoding="utf-8")

    def get_source_files(self) -> list[str]:
        """None: MANIFEST.in lists them."""
        return []

    def get_outputs(self) -> list[str]:
        """None that another step asks for."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """None: an editable install has no copy."""
        return {}


class Install(install):
    """Puts the package where packages with binaries go, when it has one."""

    def finalize_options(self) -> None:
        """Choose between the two places."""
        super().finalize_options()
        if self.get_finalized_command("build_kernels").built:
            self.install_lib = self.install_platlib


class Wheel(bdist_wheel):
    """Tags the wheel by what is in it: any platform without the library, this one with it."""

    def run(self) -> None:
        """Build the kernels first: the tag depends on them."""
        self.run_command("build_kernels")
        self.root_is_pure = not self.get_finalized_command("build_kernels").built
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Of any Python 3: the library does not link it."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)
