from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diablo_export.base_grid import BaseGrid
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.trainer.quantized import round_base
from tests import graphs, tiny

CLOSE = 5e-5  # as test_torch_graph's


def attributes(folder: Path) -> list[dict[str, Any]]:
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    return [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes if "QMoE" in node.op_type
    ]


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_in_int4(name: str, symmetric: bool, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The reference is the model with linear layers and experts rounded to the same grid, and routers that are not."""
    how: dict[str, Any] = {"quantize": "int4", "group_size": 32, "symmetric": symmetric, "accuracy_level": 1}
    graph = build_graph(tiny_model(name), tmp_path, **how)
    assert [(each["expert_weight_bits"], each["block_size"]) for each in attributes(tmp_path)] == [(4, 32)] * 2
    router = "gate" if name == "mixtral" else "router"
    assert graph.modules[f"model.layers.0.mlp.{router}"]["layout"] == "MatMul"
    network = graphs.hugging_face(tiny_model(name))
    round_base(network, BaseGrid(4, 32, symmetric))
    wanted = graphs.logits_of(network, graphs.IDS)
    got = graphs.in_steps(graphs.open_session(tmp_path), graphs.IDS, 7)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE)
    assert np.abs(wanted - graphs.logits_of(graphs.hugging_face(tiny_model(name)), graphs.IDS)).max() > 1000 * CLOSE


def test_groups_shrink_to_divide_the_experts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    graph = build_graph(tiny_model("mixtral"), tmp_path, quantize="int4", group_size=64, accuracy_level=1)
    assert [each["block_size"] for each in attributes(tmp_path)] == [32, 32]  # of inputs 64 and 96
    assert graph.modules["model.layers.0.self_attn.q_proj"]["group_size"] == 64
    network = graphs.hugging_face(tiny_model("mixtral"))
    round_base(network, BaseGrid(4, 64, True))
    got = graphs.in_steps(graphs.open_session(tmp_path), graphs.IDS, 7)
    np.testing.assert_allclose(got, graphs.logits_of(network, graphs.IDS), rtol=0, atol=CLOSE)


def test_experts_that_no_group_divides_stay_float(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make_model("mixtral", tmp_path / "model", intermediate_size=72)
    (tmp_path / "out").mkdir()
    build_graph(model, tmp_path / "out", quantize="int4", accuracy_level=1)
    assert not attributes(tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "stay float" in record.getMessage()]
    assert len(said) == 2 and "64 and 72 inputs" in said[0] and "0.2 MB" in said[0]  # 4 · (144 · 64 + 64 · 72) floats
    network = graphs.hugging_face(model)
    with torch.no_grad():
        round_base(network, BaseGrid(4, 32, True))
    got = graphs.in_steps(graphs.open_session(tmp_path / "out"), graphs.IDS, 7)
    np.testing.assert_allclose(got, graphs.logits_of(network, graphs.IDS), rtol=0, atol=CLOSE)
