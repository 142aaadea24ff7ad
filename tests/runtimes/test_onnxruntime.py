"""One folder in onnxruntime and onnxruntime-genai, each without kernels and with them: the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export import runtime
from tests.onnx_runs import IDS, LOGITS, feeds
from tests.runtimes import tools
from tests.runtimes.reference import ADAPTERS, STEPS, wanted

pytestmark = pytest.mark.runtimes
Get = Callable[..., Path]


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_onnxruntime_with_kernels(architecture: str, exported: Get) -> None:
    tools.kernels()
    folder = exported(architecture)
    session = runtime.session(folder / "model.onnx", threads=1)
    for name in ADAPTERS:
        adapter = None if name == "base" else runtime.load_adapter(folder / f"adapters/{name}.onnx_adapter")
        (logits,) = runtime.run(session, feeds(session, IDS), adapter, ["logits"])
        np.testing.assert_allclose(logits.ravel(), wanted(folder, name, 0).logits, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("architecture", ["llama", "lfm2", "qwen3_5"])
def test_the_plain_example_runs_it(architecture: str, exported: Get) -> None:
    import subprocess
    import sys

    example = tools.ROOT / "examples/06_swap_plain.py"
    folder = exported(architecture)
    done = subprocess.run([sys.executable, str(example), str(folder)], capture_output=True, text=True, check=True)
    lines = {name: [int(token) for token in tokens] for name, *tokens in map(str.split, done.stdout.splitlines())}
    prompt = [5, 17, 254, 3, 90]  # the example's
    assert lines == {name: wanted(folder, name, 6, prompt).tokens for name in ("base", "a", "b")}


@pytest.mark.parametrize("kernels", [False, True], ids=["function", "kernels"])
def test_genai(kernels: bool, exported: Get, tmp_path: Path) -> None:
    og = tools.genai()
    from tests.test_genai_swap import generate

    folder = Path(shutil.copytree(exported("llama"), tmp_path / "folder"))
    configure(folder, enable_profiling=str(tmp_path / "profile"))
    if kernels:
        configure(folder, custom_ops_library=str(tools.kernels()))
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name in ("a", "b"):
        adapters.load(str(folder / f"adapters/{name}.onnx_adapter"), name)
    for name in ADAPTERS:
        tokens, logits = generate(model, adapters, None if name == "base" else name)
        expected = wanted(exported("llama"), name, STEPS)
        assert tokens == expected.tokens
        last = expected.logits.reshape(IDS.shape[1], -1)[-1]
        np.testing.assert_allclose(logits[0], last, rtol=0, atol=LOGITS)
    del adapters, model  # the profile is written when the session ends
    (profile,) = tmp_path.glob("profile*.json")
    ran = {event.get("args", {}).get("op_name") for event in json.loads(profile.read_text())}
    assert ("BlockDiagMatMul" in ran) == kernels and "MatMul" in ran


def configure(folder: Path, **options: Any) -> None:
    """Add session options to a folder's genai_config.json."""
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"] |= options
    file.write_text(json.dumps(config))
