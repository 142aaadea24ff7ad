"""Merging into whole models as other programs write them: the builder's QDQ, and what onnxruntime's optimizer fuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime.transformers import optimizer

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_groups import read
from diablo_export.converters.onnx_match import match
from diablo_export.errors import MatchError
from diablo_export.measure.parity import parity
from diablo_export.requantize import Grid
from diablo_export.trainer.model import load_base
from tests import tiny
from tests.test_onnx_merge import touched


@pytest.mark.slow
def test_the_genai_builders_qdq(
    tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    given = tiny.build_with_genai(tiny_model("llama"), tmp_path / "int4", "int4", "use_qdq=true")
    manifest = merge(given.parent, tiny_adapter("llama"), tmp_path / "out", method="rtn")
    assert manifest["quantize"] == "int4"
    modules = Adapter.load(tiny_adapter("llama")).modules
    grids = [
        {name: read(one, folder) for name, one in match(ir.load(folder / "model.onnx"), modules).items()}
        for folder in (given.parent, tmp_path / "out")
    ]
    for name, one in modules.items():
        before, after = (each[name] for each in grids)
        met = touched(one.shape, before.codes.shape[-1])
        assert _same(before, after, ~met) and not _same(before, after, met)
    # survival is what rounding a random model leaves; the rest must be as for any other int4 merge
    report = parity(tmp_path / "out", limit={"adapter.survival_gain": 0.5, "adapter.survival_cosine": 0.5})
    assert report["verdict"] == "pass" and report["first_divergent_module"] is None
    assert {one["name"] for one in report["modules"]} >= modules.keys()


def _same(first: Grid, second: Grid, mask: Array) -> bool:
    return all(
        np.array_equal(getattr(first, name)[mask], getattr(second, name)[mask]) for name in ("codes", "scales", "zeros")
    )


def test_bert_as_onnxruntimes_optimizer_fuses_it(
    tiny_model: Callable[..., Path], tiny_adapter: Any, tmp_path: Path
) -> None:
    """q, k and v side by side in Attention, biases inside SkipLayerNormalization and BiasGelu."""
    network, _ = load_base(tiny_model("bert"), "text-classification")
    names, example = ["input_ids", "attention_mask", "token_type_ids"], torch.ones(2, 7, dtype=torch.int64)
    network.set_attn_implementation("eager")  # type: ignore[operator]
    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    torch.onnx.export(
        network, (example,) * 3, str(tmp_path / "plain.onnx"), input_names=names, output_names=["logits"],
        dynamic_axes=axes, dynamo=False, opset_version=17,
    )  # fmt: skip
    fused = optimizer.optimize_model(str(tmp_path / "plain.onnx"), "bert", num_heads=4, hidden_size=64, opt_level=0)
    base = Path(shutil.copytree(tiny_model("bert"), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")))
    fused.save_model_to_file(str(base / "model.onnx"))
    assert sum(node.op_type == "Attention" for node in fused.model.graph.node) == 2
    manifest = merge(base, tiny_adapter("bert"), tmp_path / "out")
    held = [entry for entry in manifest["modules"] if entry["layout"] == "Attention"]
    assert sorted(entry["rows"] for entry in held) == [[0, 64]] * 2 + [[64, 128]] * 2 + [[128, 192]] * 2
    report = parity(tmp_path / "out")
    assert report["verdict"] == "pass" and report["adapter"]["survival_gain"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(MatchError, match="weights that are not read here: 2 Attention"):
        export(base, tiny_adapter("bert"), tmp_path / "branch")
