"""Training on the grid: what is trained is whole steps of it, and a merge has the trained codes, bit for bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from diablo_export.adapter import Adapter, base_weight
from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import Array, dense
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import budget, grid_methods
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_linears import linears, numpy_of
from diablo_export.quantization import unpack
from diablo_export.trainer.initial import begin_at_float
from diablo_export.trainer.layer import DiabloLinear, diablo_layers
from diablo_export.trainer.loop import Step
from diablo_export.trainer.model import load_base, load_tuned
from diablo_export.trainer.on_grid import OnGridLinear, hardening, put_on_grid, settle
from diablo_export.trainer.quantized import pack_base
from diablo_export.trainer.targets import choose_targets, wrap_targets
from diablo_export.trainer.train import train
from tests.onnx_runs import IDS, LOGITS, runner
from tests.test_quantized import RUN, exact
from tests.test_quantized import texts as texts

Get = Callable[[str], Path]


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_LENGTH", 32), ("_JUDGED", 4), ("_MOMENTS", 4)):
        monkeypatch.setattr(grid_methods, name, value)
    monkeypatch.setattr(budget, "BATCH_TOKENS", 128)


@pytest.fixture(scope="module")
def trained(tiny_model: Get, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained("llama") is an adapter that was trained on the grid of the tiny model."""

    @functools.cache
    def get(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture) / "adapter"
        classify = architecture == "bert"
        how = {**RUN, "lr": 0.05, "task": "text-classification" if classify else "causal-lm"}
        data = texts / ("labels.jsonl" if classify else "text.jsonl")
        train(tiny_model(architecture), data, folder, base_quantize="int4", on_grid=True, **how)
        return folder

    return get


def on_grid_layer(grid: BaseGrid, sizes: tuple[int, int] = (40, 24)) -> OnGridLinear:
    torch.manual_seed(0)
    network = torch.nn.Sequential(DiabloLinear.from_linear(torch.nn.Linear(*sizes), num_blocks=4))
    pack_base(network, grid)
    put_on_grid(network)
    layer = network[0]
    assert isinstance(layer, OnGridLinear)
    return layer


def codes_of(adapter: Adapter, base: Path, name: str) -> Array:
    """The trained codes, (out, groups, group_size): the base's, moved by the blocks' whole steps."""
    assert adapter.base_grid is not None
    module = adapter.modules[name]
    stored = adapter.base_grid.quantize(base_weight(Checkpoint.open(base), name))
    codes = unpack(stored.codes, stored.bits, stored.group_size).astype(np.int64)
    delta = dense(module.blocks, module.in_features, module.out_features).T
    padded = np.pad(delta, ((0, 0), (0, -delta.shape[1] % stored.group_size))).reshape(codes.shape)
    moves = padded / np.where(stored.scales == 0, np.inf, stored.scales)[..., None]
    # a float32 product of a step and a whole number, divided by the step again
    assert np.abs(moves - np.rint(moves)).max() < 1e-5
    moved: Array = codes + np.rint(moves).astype(np.int64)
    assert moved.min() >= 0 and moved.max() < 2**stored.bits
    return moved


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_are_whole_steps_within_the_grid(bits: int, symmetric: bool) -> None:
    layer = on_grid_layer(BaseGrid(bits, 16, symmetric))
    with torch.no_grad():
        layer.blocks.normal_(0, 0.2)
    whole = layer.whole()
    moves = torch.where(layer.steps == 0, 0, whole / torch.where(layer.steps == 0, 1, layer.steps))
    assert torch.allclose(moves, moves.round(), atol=1e-4)  # float32: a product divided by its factor
    assert whole.any() and bool((moves.round() >= layer.lowest).all() and (moves.round() <= layer.highest).all())
    x = torch.randn(3, 40)
    wanted = x @ (layer.base.weight + torch.from_numpy(dense(whole.numpy(), 40, 24).T)).T + layer.base.bias
    assert torch.allclose(layer(x), wanted, atol=1e-5)  # sums of 40 products of order 1 in another order
    layer.project()
    assert torch.equal(layer.whole(), whole), "what lies beyond the grid's ends counts as its ends"
    settle(torch.nn.Sequential(layer))
    assert torch.equal(layer.blocks, whole) and torch.equal(layer.whole(), whole)


def test_gradients_pass_rounding_and_rounding_comes_in_by_degrees() -> None:
    layer = on_grid_layer(BaseGrid(4, 16, True))
    plain = DiabloLinear(layer.base, torch.zeros(layer.shape.blocks), layer.shape)
    x, upstream = torch.randn(3, 40), torch.randn(3, 24)
    for each in (layer, plain):
        (each(x) * upstream).sum().backward()
    assert torch.allclose(layer.blocks.grad, plain.blocks.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.blocks.normal_(0, 0.02)
    seen: list[int] = []
    after = hardening(layer, 10, 0, lambda done: seen.append(done.step))
    layer.train()
    assert layer.hardness == 0 and torch.equal(layer(x), DiabloLinear(layer.base, layer.blocks, layer.shape)(x))
    with torch.no_grad():
        layer.blocks[0, 0, 0] = 100.0
    after(Step(4, 0.0, 0.0, 0.0, 0, 0.0))
    ends = (layer.lowest * layer.steps)[0, 0, 0], (layer.highest * layer.steps)[0, 0, 0]
    assert layer.hardness == 0.5 and layer.blocks[0, 0, 0] == max(ends) and seen == [4]
    after(Step(9, 0.0, 0.0, 0.0, 0, 0.0))
    assert layer.hardness == 1
    hard = layer(x)
    assert torch.equal(hard, layer.eval()(x))
    hardening(layer, 10, 6, lambda done: None)
    assert layer.hardness == 0.75, "a resumed run goes on where it was"
    assert torch.equal(hard, layer(x)), "what is evaluated is what is saved"


@pytest.mark.parametrize(
    "architecture",
    ["llama", pytest.param("bert", marks=pytest.mark.slow)],  # blocks of half a group; zero points, and a float head
)
def test_a_merge_has_the_trained_codes(
    architecture: str, tiny_model: Get, trained: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = tiny_model(architecture), Adapter.load(trained(architecture))
    assert adapter.base_grid is not None and adapter.base_grid.on_grid
    manifest = merge(base, trained(architecture), tmp_path / "out", quantize="int4")
    survival = manifest["survival"]
    (row,) = survival["tried"]
    assert (survival["method"], survival["passed"]) == ("on_grid", True) and row["codes_changed"] > 0.01
    # the branch adds its steps to the product, the merge to the weight: float32 rounding apart
    assert abs(row["gain"] - 1) < 1e-4 and row["cosine"] > 0.9999 and row["kl"] < 1e-8 < row["base_kl"]
    assert not [one for one in caplog.messages if "trained" in one and "grid" in one]
    layers = {layer.weight.name: layer for layer in linears(ir.load(tmp_path / "out/model.onnx"))}
    for entry in manifest["modules"]:
        layer, wanted = layers[entry["weight"]], codes_of(adapter, base, entry["name"])
        stored = adapter.base_grid.quantize(base_weight(Checkpoint.open(base), entry["name"]))
        assert layer.scales is not None
        assert np.array_equal(numpy_of(layer.scales).reshape(stored.scales.shape), stored.scales)
        if layer.zero_points is not None and stored.zero_points is not None:
            assert np.array_equal(numpy_of(layer.zero_points).ravel(), stored.zero_points.ravel())
        codes = unpack(numpy_of(layer.weight), 4, stored.group_size)
        assert np.array_equal(codes.reshape(wanted.shape), wanted)
        assert (codes != unpack(stored.codes, 4, stored.group_size)).any(), "nothing was trained"
        assert entry["disturbed_weights"] == 0
    with torch.no_grad():
        logits = load_tuned(base, adapter)[0](torch.from_numpy(IDS)).logits.numpy()
    found = runner(exact(tmp_path / "out"))()
    assert np.abs(found.reshape(logits.shape) - logits).max() <= LOGITS


def test_without_torch_and_into_an_onnx_base_the_codes_are_the_same(
    tiny_model: Get, trained: Get, tmp_path: Path
) -> None:
    base, adapter = tiny_model("llama"), trained("llama")
    (tmp_path / "base").mkdir()
    build_graph(base, tmp_path / "base", quantize="int4")
    for name, model, how in (
        ("measured", base, {"quantize": "int4"}),
        ("rounded", base, {"quantize": "int4", "method": "rtn"}),
        ("onnx", tmp_path / "base", {}),
        ("onnx-rounded", tmp_path / "base", {"method": "rtn"}),
    ):
        manifest = merge(model, adapter, tmp_path / name, **how)
        assert all("moved the codes" in e["why"] or "on_grid" in e["why"] for e in manifest["modules"])
    files = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("measured", "rounded", "onnx")]
    assert files[0] == files[1] == files[2] == (tmp_path / "onnx-rounded/model.onnx.data").read_bytes()


def test_on_another_grid_it_is_merged_as_any_other(
    tiny_model: Get, trained: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = merge(
        tiny_model("llama"), trained("llama"), tmp_path / "out", quantize="int4", group_size=16, min_survival=0.01,
        max_seconds=0.1,
    )  # fmt: skip
    assert "the base here is int4 in groups of 16" in caplog.text
    assert "was trained to move the codes of another grid" in caplog.text
    assert "on_grid" not in [row["method"] for row in manifest["survival"]["tried"]]


def test_a_float_adapter_goes_onto_the_grid(tiny_model: Get, tiny_adapter: Get, texts: Path, tmp_path: Path) -> None:
    """Nearly no training: what is left is each tuned weight's nearest code."""
    base, grid = tiny_model("llama"), BaseGrid(4, 32, True)
    train(
        base, texts / "text.jsonl", tmp_path / "a", base_quantize="int4", on_grid=True,
        init_adapter=tiny_adapter("llama"), **{**RUN, "num_blocks": None, "lr": 1e-9},
    )  # fmt: skip
    before, after = Adapter.load(tiny_adapter("llama")), Adapter.load(tmp_path / "a")
    assert after.num_blocks == 4 and after.modules.keys() == before.modules.keys()
    for name, module in after.modules.items():
        weight = base_weight(Checkpoint.open(base), name)
        stored = grid.quantize(weight)
        delta = dense(before.modules[name].blocks, module.in_features, module.out_features).T
        tuned = np.pad(weight + delta, ((0, 0), (0, -weight.shape[1] % 32))).reshape(len(weight), -1, 32)
        nearest = np.clip(np.rint(tuned / stored.scales[..., None] + 8), 0, 15)
        under = np.pad(delta != 0, ((0, 0), (0, -weight.shape[1] % 32))).reshape(nearest.shape)
        # a weight half-way between two codes may go either way in float32
        assert (codes_of(after, base, name) == nearest)[under].mean() > 0.999


def test_it_begins_at_the_base_weights_within_their_codes(tiny_model: Get) -> None:
    """So that small moves change a share of the codes."""
    base = tiny_model("llama")
    network, _ = load_base(base, "causal-lm")
    wrap_targets(network, choose_targets(network), 4)
    pack_base(network, BaseGrid(4, 32, True))
    put_on_grid(network)
    begin_at_float(network, Checkpoint.open(base))
    for name, layer in diablo_layers(network).items():
        assert isinstance(layer, OnGridLinear)
        away = (layer.blocks / torch.where(layer.steps == 0, 1, layer.steps)).detach()
        assert not layer.whole().any(), f"{name}: a weight began at another code than the base's"
        # weights spread over a step by 1/√12, 0.29; the largest of a group are on a code or beyond the last
        assert 0.25 < float(away.std()) < 0.33 and float(away.abs().max()) <= 1.0


def test_the_record_says_so(trained: Get) -> None:
    config: dict[str, Any] = json.loads((trained("llama") / "adapter_config.json").read_text())
    assert config["base_quantization"] == {"bits": 4, "group_size": 32, "symmetric": True, "on_grid": True}
