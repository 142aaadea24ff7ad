"""Exported folders in optimum's ORTModel classes, which live in an environment of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export.converters.merge import merge
from tests.onnx_runs import LOGITS, in_torch
from tests.runtimes import tools
from tests.runtimes.reference import ADAPTERS, PROMPT, STEPS, wanted

pytestmark = pytest.mark.runtimes
Get = Callable[..., Path]


def measure(folder: Path, **job: Any) -> Any:
    job = {"adapters": ADAPTERS, "ids": PROMPT, "steps": STEPS} | job
    command = [str(tools.optimum()), str(tools.HERE / "in_optimum.py"), str(folder), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("architecture", "quantize", "kind"),
    [
        ("llama", "none", "ORTModelForCausalLM"),
        ("llama", "int4", "ORTModelForCausalLM"),
        ("gpt2", "none", "ORTModelForCausalLM"),  # with position_ids
        ("bert", "none", "ORTModelForSequenceClassification"),
    ],
)
def test_base_and_adapters_of_a_branch(architecture: str, quantize: str, kind: str, exported: Get) -> None:
    tools.optimum()
    folder, steps = exported(architecture, quantize), 0 if architecture == "bert" else STEPS
    measured = measure(folder, steps=steps)
    assert measured["class"] == kind
    for name, one in zip(ADAPTERS, measured["found"], strict=True):
        expected = wanted(folder, name, steps)
        np.testing.assert_allclose(one["logits"], expected.logits, rtol=0, atol=LOGITS)
        assert one["tokens"] == expected.tokens


def test_with_kernels(exported: Get) -> None:
    tools.optimum()
    folder = exported("llama")
    for name, one in zip(ADAPTERS, measure(folder, kernels=str(tools.kernels()))["found"], strict=True):
        np.testing.assert_allclose(one["logits"], wanted(folder, name, 0).logits, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_merged_model(architecture: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    tools.optimum()
    merge(tiny_model(architecture), tiny_adapter(architecture), tmp_path / "out", format="onnx")
    (one,) = measure(tmp_path / "out", adapters=["base"], steps=0 if architecture == "bert" else STEPS)["found"]
    tuned = in_torch(tiny_model(architecture), tiny_adapter(architecture))
    np.testing.assert_allclose(one["logits"], tuned.ravel(), rtol=0, atol=LOGITS)
    assert one["tokens"] == ([] if architecture == "bert" else wanted(tmp_path / "out", "base").tokens)
