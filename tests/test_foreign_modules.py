"""Exports of other programs, module by module: which one is off, and none that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests import exports, foreign
from tests.foreign import judge, put_into_a_file

pytest.importorskip("peft")
Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tiny_model: Get) -> Path:
    return tiny_model("llama")


def faults(report: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["fault"] for row in report["modules"] if row["fault"]}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_modules_of_sound_exports_are_all_found_and_none_is_named(
    precision: str, model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]
) -> None:
    report = judge(built("lora", precision), model, peft_adapters["lora"], modules=True)
    assert report["verdict"] == "pass", exports.failed(report)
    assert len(report["modules"]) == 15 and not faults(report) and report["first_divergent_module"] is None
    assert report["environment"]["modules_not_found"] == {}
    assert report["modules"][0]["name"] == "model.layers.0.self_attn.q_proj"  # in the network's order
    # float32 sums; float16 rounds by 66 dB; int4 errors of random weights are an eleventh
    least = {"fp32": 100, "fp16": 60, "int4": 20}[precision]
    assert all(row["local_sqnr_db"] > least for row in report["modules"])
    adapted = [row for row in report["modules"] if row["name"].endswith(("q_proj", "v_proj", "down_proj"))]
    # off by the rounding of the base, which is torch's here: it counts as effect
    off = 1e-4 if precision == "fp32" else 0.01 if precision == "fp16" else 0.2
    assert all(row["survival_gain"] == pytest.approx(1, abs=off) for row in adapted)


@pytest.mark.slow  # three models, one exported by torch
@pytest.mark.parametrize(("architecture", "precision"), [("qwen2", "int4"), ("qwen3", "fp32"), ("gpt2", "torch")])
def test_modules_of_other_architectures(architecture: str, precision: str, tiny_model: Get, tmp_path: Path) -> None:
    base = tiny_model(architecture)  # qwen2 has biases, gpt2 Conv1D
    targets = {"target_modules": ["c_attn", "c_fc"]} if architecture == "gpt2" else {}
    adapter = foreign.make_peft(base, tmp_path / "lora", **targets)
    if precision == "torch":
        merged = foreign.merge_peft(base, adapter, tmp_path / "merged")
        out = foreign.export_with_torch(merged, tmp_path / "out" / "m.onnx").parent
    else:
        out = foreign.build(base, tmp_path / "out", precision, f"adapter_path={adapter}")
    report = judge(out, base, adapter, modules=True)
    assert report["environment"]["modules_not_found"] == {} and not faults(report)
    assert len(report["modules"]) == (9 if architecture == "gpt2" else 15)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_lost_magnitudes_are_named_at_their_modules(
    precision: str, model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]
) -> None:
    """The builder leaves DoRA's magnitudes out, and every module that has them is named, and no other."""
    report = judge(built("dora", precision), model, peft_adapters["dora"], modules=True)
    assert "modules.faulty" in exports.failed(report)
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert faults(report) == {f"model.layers.{layer}.{kind}": "output" for layer in range(2) for kind in kinds}
    assert report["first_divergent_module"] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("precision", "fault"), [("fp32", "output"), ("int4", "adapter")])
def test_an_adapter_that_is_not_there_is_named_where_it_should_be(
    precision: str, fault: str, model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]
) -> None:
    report = judge(built(None, precision), model, peft_adapters["lora"], modules=True)
    assert report["first_divergent_module"] == "model.layers.0.self_attn.q_proj"
    assert set(faults(report).values()) == {fault} and len(faults(report)) == 6


def test_a_broken_weight_of_another_program_is_named(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    """Its values are not the module's, so its name tells which one it should be."""
    out = exports.copy(built("lora"), tmp_path / "out")
    graph = onnx.load(out / "model.onnx")
    (node,) = (n for n in graph.graph.node if n.op_type == "MatMul" and "layers.1/attn/o_proj" in n.name)
    (tensor,) = (t for t in graph.graph.initializer if t.name == node.input[1])
    turned = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
    tensor.CopyFrom(onnx.numpy_helper.from_array(turned, tensor.name))
    onnx.save(graph, out / "model.onnx")
    report = judge(out, model, peft_adapters["lora"], modules=True)
    assert faults(report) == {"model.layers.1.self_attn.o_proj": "output"}


def test_modules_of_an_adapter_in_its_own_file(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    out = exports.copy(built("lora"), tmp_path / "out")
    put_into_a_file(out / "model.onnx", out / "poems.onnx_adapter")
    report = judge(out, model, peft_adapters["lora"], modules=True)
    assert report["verdict"] == "pass" and len(report["modules"]) == 15, exports.failed(report)
    # the base is the same graph with the adapter at zero
    assert report["modules"][0]["survival_gain"] == pytest.approx(1, abs=1e-4)
