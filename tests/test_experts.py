"""The experts of a quantized export beside their twins in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.stacked_view import stacked_view
from diablo_export.measure.experts import audit_experts, lay_experts
from diablo_export.measure.places import Graph
from diablo_export.trainer.experts import WEIGHTS, round_experts, set_rounded, weight_of
from tests import graphs, tiny


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_weight_comes_back_as_it_was_given(name: str, tiny_model: Callable[[str], Path]) -> None:
    experts = graphs.hugging_face(tiny_model(name)).model.layers[1].mlp.experts
    for weight in WEIGHTS:
        before = experts.get_parameter(weight)
        set_rounded(experts, weight, lambda expert, weight=weight: weight_of(experts, weight, expert))
        assert experts.get_parameter(weight) is not before
        torch.testing.assert_close(experts.get_parameter(weight), before, rtol=0, atol=0)


def experts_of(folder: Path, graph: Graph) -> tuple[onnx.NodeProto, nn.Module]:
    path, node = list(graph.experts.items())[1]
    return node, graphs.hugging_face(folder).get_submodule(path)


@pytest.mark.parametrize(("name", "symmetric"), [("mixtral", True), ("gpt-oss", False)])
def test_codes_are_held_against_the_base(
    name: str, symmetric: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    build_graph(tiny_model(name), tmp_path, quantize="int4", symmetric=symmetric)
    graph = Graph(tmp_path / "model.onnx")
    node, experts = experts_of(tiny_model(name), graph)
    # rounding to nearest is off by 0.29 steps on average; the worst of some hundred groups of 32 by more
    assert 0.29 < audit_experts(graph, node, experts).worst < 0.6
    scales = graph.stored[node.input[6]]  # of the down projection
    offset = int(next(entry.value for entry in scales.external_data if entry.key == "offset"))
    with (tmp_path / "model.onnx.data").open("r+b") as file:
        file.seek(offset)
        first = np.frombuffer(file.read(4), np.float32)
        file.seek(offset)
        file.write((2 * first).tobytes())  # one group of one expert
    assert audit_experts(Graph(tmp_path / "model.onnx"), node, experts).worst > 2


def test_a_network_is_given_the_experts_of_a_graph(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    build_graph(tiny_model("mixtral"), tmp_path, quantize="int4")
    network, rounded = (graphs.hugging_face(tiny_model("mixtral")) for _ in range(2))
    lay_experts(Graph(tmp_path / "model.onnx"), network.model.layers[1], "model.layers.1")
    round_experts(rounded, BaseGrid(4, 32, True))
    for weight in WEIGHTS:
        given, wanted = (one.model.layers[1].mlp.experts.get_parameter(weight) for one in (network, rounded))
        torch.testing.assert_close(given, wanted, rtol=0, atol=0)


def test_a_checkpoint_as_it_is_loaded(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    stored = Checkpoint.open(tiny_model("mixtral"))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in stored.tensors
    loaded = stacked_view(stored)
    wanted = graphs.hugging_face(tiny_model("mixtral")).state_dict()
    assert set(loaded.tensors) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(loaded.tensors[name].read(), value.numpy())
    dense = Checkpoint.open(tiny_model("llama"))
    assert stacked_view(dense) is dense


def test_a_checkpoint_whose_tensors_are_only_renamed(tmp_path: Path) -> None:
    model = tiny.make_model("granitemoe", tmp_path)
    stored = Checkpoint.open(model)
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in stored.tensors
    wanted = graphs.hugging_face(model).state_dict()
    assert set(stacked_view(stored).tensors) | {"lm_head.weight"} == set(wanted)
