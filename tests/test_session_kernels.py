"""What a session says about kernels, and when it leaves them out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from diablo_export import kernel_check, machine, opschema, runtime

IDLE = onnx.parser.parse_function(
    f'<domain: "{opschema.DOMAIN}", opset_import: ["" : 18]> {opschema.NAME} (X, D, Y0) => (Y) {{ Y = Identity (Y0) }}'
)
FEEDS = {name: np.ones(size, np.float32) for name, size in (("X", (1, 64)), ("D", (4, 16, 12)), ("Y0", (1, 48)))}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One branch; its function body leaves the blocks out, so that Y tells whether a kernel ran: 17, or else 1."""
    path = tmp_path / "model.onnx"
    path.write_bytes(kernel_check.one_node(IDLE))
    return path


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in a new process, where nothing was said yet."""
    runtime._say_once.cache_clear()
    caplog.set_level(logging.INFO, "diablo_export")


def y(session: Any) -> float:
    return float(session.run(None, FEEDS)[0].max())


def test_it_says_once_which_library(model: Path, library: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert y(runtime.session(model)) == y(runtime.session(model)) == 17
    about = runtime.describe_library(library)
    version, isa = about.get("version", "unknown"), about.get("isa", "unknown")
    assert caplog.messages == [f"kernels: {library}, version {version}, with {isa}"]


def test_switched_off(model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, "off")
    assert y(runtime.session(model)) == 1
    assert caplog.messages == ["kernels: none (switched off by DIABLO_KERNELS=off); branches run as standard operators"]


def test_none_found(model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(runtime.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(runtime, "__file__", str(model))  # an installation that holds no library
    assert y(runtime.session(model)) == 1
    (model.parent / "kernels").mkdir()
    (model.parent / "kernels" / "not_built.txt").write_text("no C++ compiler\n")  # as the build leaves it
    assert y(runtime.session(model)) == 1
    assert caplog.messages == [
        "kernels: none (not built); branches run as standard operators",
        "kernels: none (not in this wheel: no C++ compiler); branches run as standard operators",
    ]


def test_a_library_for_the_cpu_is_left_out_elsewhere(
    model: Path, library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """onnxruntime would copy each branch's inputs to the CPU and its output back."""
    others = [name for name in ort.get_available_providers() if name != "CPUExecutionProvider"]
    if not others:
        pytest.skip("this onnxruntime has no other provider")
    if others[0] == "CUDAExecutionProvider" and runtime.describe_library(library).get("cuda"):
        pytest.skip("this library has CUDA kernels")
    assert y(runtime.session(model, providers=[others[0], "CPUExecutionProvider"])) == 1
    assert f"on {others[0]} branches run as standard operators" in caplog.text


def test_the_library_says_what_it_is(library: Path) -> None:
    about = runtime.describe_library(library)
    assert set(about) >= {"version", "isa", "cuda"} and about["isa"] in ("avx512", "avx2", "neon", "portable"), (
        f"{library} is older than kernels/ort/describe.cc; build it again"
    )
    instructions = machine.hardware()["instructions"]
    assert (about["isa"] == "avx512") == ({"avx512f", "avx2", "fma", "f16c"} <= set(instructions))
