"""Kernels in the package: when a build leaves them out, and that it says why. tests/wheel_check.sh builds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools", "77")  # what pyproject.toml asks for

import build_backend  # noqa: E402


@pytest.fixture(autouse=True)
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(build_backend.VARIABLE, raising=False)


def build(folder: Path) -> Any:
    command = build_backend.BuildKernels(setuptools.Distribution({"name": "x"}))
    command.build_lib = str(folder)
    command.ensure_finalized()
    command.run()
    return command


def tools(folder: Path, *names: str) -> str:
    """A PATH of programs that do nothing, well."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_without_a_compiler_the_wheel_is_pure_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "cmake"))
    stale = tmp_path / "lib" / build_backend.FOLDER / "libdiablo_kernels_ort.so"
    stale.parent.mkdir(parents=True)
    stale.touch()  # of an earlier build in the same folder
    assert build(tmp_path / "lib").built is False
    note = (stale.parent / build_backend.NOTE).read_text()
    assert note == "no C++ compiler: none of c++, g++, clang++ found, and CXX is not set\n"
    assert capsys.readouterr().err == f"diablo-export: pure Python wheel, without kernels: {note}"
    assert [path.name for path in stale.parent.iterdir()] == [build_backend.NOTE]


def test_a_build_that_fails_leaves_a_pure_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", "g++"))
    assert build(tmp_path / "lib").built is False
    note = tmp_path / "lib" / build_backend.FOLDER / build_backend.NOTE
    assert note.read_text() == "no cmake; pip install cmake\n"
    (tmp_path / "bin" / "cmake").write_text("#!/bin/sh\necho it broke\nexit 3\n")
    (tmp_path / "bin" / "cmake").chmod(0o755)
    assert build(tmp_path / "lib").built is False
    assert note.read_text() == "`cmake -S …` failed with exit code 3; its output is above\n"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("require", "DIABLO_KERNELS_BUILD=require: the kernels could not be built: no C\\+\\+ compiler"),
        ("yes", "DIABLO_KERNELS_BUILD=yes: must be auto, require or off"),
    ],
)
def test_what_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, message: str) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin"))
    monkeypatch.setenv(build_backend.VARIABLE, wish)
    with pytest.raises(SystemExit, match=message):
        build(tmp_path / "lib")


def test_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build_backend.VARIABLE, "off")
    assert build(tmp_path / "lib").built is False


def test_an_editable_install_builds_nothing(tmp_path: Path) -> None:
    command = build_backend.BuildKernels(setuptools.Distribution({"name": "x"}))
    command.build_lib, command.editable_mode = str(tmp_path), True
    command.run()
    assert not list(tmp_path.iterdir())


def test_cmake_comes_from_the_registry_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_backend._setuptools, "get_requires_for_build_wheel", lambda settings: ["own"])
    monkeypatch.setenv("PATH", tools(tmp_path / "nothing"))
    assert build_backend.get_requires_for_build_wheel() == ["own"]  # no compiler: no need for it
    monkeypatch.setenv("PATH", tools(tmp_path / "compiler", "c++"))
    assert build_backend.get_requires_for_build_wheel() == ["own", "cmake>=3.22", "ninja"]
    monkeypatch.setenv("PATH", tools(tmp_path / "all", "c++", "cmake", "make"))
    assert build_backend.get_requires_for_build_wheel() == ["own"]
