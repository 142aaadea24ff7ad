"""The C++ example on the plain C interface, built and run: the same tokens."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from tests.runtimes import tools
from tests.runtimes.reference import PROMPT, STEPS, wanted

pytestmark = pytest.mark.runtimes
Get = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def swap(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """swap(folder, more arguments…) runs the example on PROMPT for STEPS tokens."""
    program = tmp_path_factory.mktemp("cpp") / "swap"
    line = re.search(r"^\$ c\+\+ (.*) -o swap$", (tools.ROOT / "docs/runtimes.md").read_text(), re.MULTILINE)
    assert line, "the command that the documentation gives"
    flags = [*line[1].split(), "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-o", str(program)]
    subprocess.run([tools.compiler(), *flags], check=True, cwd=tools.ROOT)
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.*[0-9]*")

    def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [program, folder, library, " ".join(map(str, PROMPT)), STEPS, *arguments]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("architecture", "quantize"), [("llama", "none"), ("llama", "int4"), ("lfm2", "none"), ("qwen3_5", "none")]
)
def test_base_and_two_adapters(architecture: str, quantize: str, swap: Run, exported: Get) -> None:
    folder = exported(architecture, quantize)
    done = swap(folder, "a", "b")
    assert done.returncode == 0, done.stderr
    lines = {name: [int(token) for token in tokens] for name, *tokens in map(str.split, done.stdout.splitlines())}
    assert lines == {name: wanted(folder, name).tokens for name in ("base", "a", "b")}
    assert len(set(map(tuple, lines.values()))) > 1


def test_with_kernels(swap: Run, exported: Get) -> None:
    kernels, folder = tools.kernels(), exported("llama")
    done = swap(folder, "--kernels", kernels, "a", "b")
    assert (done.returncode, done.stdout) == (0, swap(folder, "a", "b").stdout), done.stderr


def test_faults_are_told(swap: Run, exported: Get) -> None:
    for arguments, message in [
        ((exported("llama"), "nobody"), "adapter_format_utils|fd was supplied|No such file"),
        ((exported("bert"),), "the model wants token_type_ids; this example feeds decoders"),
        ((exported("llama"), "--kernels", "/nowhere.so"), "/nowhere.so"),
    ]:
        done = swap(*arguments)
        assert done.returncode == 1
        assert any(part in done.stderr for part in message.split("|")), done.stderr
