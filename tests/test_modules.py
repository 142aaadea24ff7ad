from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diablo_export.adapter import Adapter
from diablo_export.converters.onnx_adapters import write_onnx_adapter
from diablo_export.manifest import read_manifest
from diablo_export.measure import twins
from diablo_export.measure.parity import parity
from diablo_export.measure.places import Graph
from diablo_export.measure.prompts import Sample
from diablo_export.measure.taps import TorchTaps
from diablo_export.runtime import load_adapter
from diablo_export.trainer.model import load_tuned
from tests import exports, tiny

Get = Callable[[str], Path]
BOUNDS: dict[str, Any] = {"max_tokens": 96, "steps": 4, "threads": 1}
KEYS = [
    "name", "local_sqnr_db", "inherited_sqnr_db", "survival_gain", "survival_cosine", "input_sqnr_db",
    "output_sqnr_db", "worst_group_steps", "fitted_error_ratio", "kernel_noise_ratio", "fault",
]  # fmt: skip


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["modules"]}


@pytest.fixture(scope="module")
def report(exported: Callable[..., Path]) -> dict[str, Any]:
    return parity(exported("llama", "int4"), adapter=["a"], **BOUNDS)


def test_every_linear_layer_is_in_the_network_s_order(report: dict[str, Any], tiny_adapter: Get) -> None:
    found = rows(report)
    order = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    assert list(found) == [*(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in order), "lm_head"]
    assert set(Adapter.load(tiny_adapter("llama")).modules) < set(found)
    assert all(list(row) == KEYS for row in found.values())


def test_errors_of_int4_are_told_apart(report: dict[str, Any]) -> None:
    """Rounding to 4 bits is 20 to 23 dB in each module, adds up with depth, and is not in norms and attention."""
    first, last = report["modules"][0], report["modules"][-1]
    assert all(18 < row["local_sqnr_db"] < 25 for row in report["modules"])
    assert first["inherited_sqnr_db"] > 18 and last["inherited_sqnr_db"] < first["inherited_sqnr_db"] - 3
    # float32 of two frameworks, measured at 125 and more, through every norm and attention
    assert all(row["input_sqnr_db"] > 100 for row in report["modules"])
    assert all(
        0.25 < row["worst_group_steps"] < 0.5 for row in report["modules"]
    )  # rounding to nearest: 0.29 on average
    assert report["first_divergent_module"] is None


def test_survival_by_module(report: dict[str, Any], exported: Callable[..., Path]) -> None:
    # the first modules read what tuned reads, so only int8 activations are between their effect and the wanted one
    first = report["modules"][0]
    assert first["survival_gain"] == pytest.approx(1, abs=0.02) and first["survival_cosine"] > 0.99
    assert all(0.6 < row["survival_gain"] < 1.2 for row in report["modules"])
    other = rows(parity(exported("llama", "int4"), adapter=["b"], **BOUNDS))  # on the last layer only
    assert other["model.layers.0.self_attn.q_proj"]["survival_gain"] is None  # nothing was wanted
    assert other["model.layers.1.self_attn.q_proj"]["survival_gain"] == pytest.approx(1, abs=0.1)


def test_a_module_whose_blocks_are_dead_is_named(exported: Callable[..., Path], tmp_path: Path) -> None:
    out, dead = exports.copy(exported("llama"), tmp_path / "out"), "model.layers.1.self_attn.v_proj"
    file = out / "adapters" / "a.onnx_adapter"
    values = {name: value * (dead not in name) for name, value in load_adapter(file).values().items()}
    write_onnx_adapter(file, {name: value.astype(np.float32) for name, value in values.items()})
    report = parity(exports.announce(out), **BOUNDS)
    assert [name for name, row in rows(report).items() if row["fault"]] == [dead] == [report["first_divergent_module"]]
    assert rows(report)[dead]["survival_gain"] < 0.9 < rows(report)["model.layers.0.mlp.down_proj"]["survival_gain"]
    assert exports.checks(report)["modules.faulty@a"] is False and exports.checks(report)["modules.faulty@b"] is True


@pytest.mark.parametrize("kind", ["branch", "merge"])
@pytest.mark.parametrize(("architecture", "precision"), [("llama", "fp32"), ("qwen2", "int4")])
def test_q_k_and_v_in_one_weight(
    architecture: str, precision: str, kind: str, genai_graph: Callable[..., Path], tiny_model: Get,
    tiny_adapter: Get, tmp_path: Path,
) -> None:  # fmt: skip
    """Another program's graph: fused, no marks; qwen2's with biases behind the fused node and a rounded table."""
    graph, adapter, out = genai_graph(architecture, precision), tiny_adapter(architecture), tmp_path / "out"
    if kind == "branch":
        exports.branched(graph, {"a": adapter}, out)
    else:
        exports.merged(graph, adapter, out, **({"method": "refit"} if precision == "int4" else {}))
    report = parity(out, model=tiny_model(architecture), **BOUNDS)
    assert set(rows(report)) - {"lm_head"} == set(Adapter.load(adapter).modules)  # an int4 head is watched as well
    assert report["first_divergent_module"] is None
    least = 100 if precision == "fp32" else 15
    assert all(row["local_sqnr_db"] > least and row["input_sqnr_db"] > 100 for row in report["modules"])


@pytest.mark.parametrize("kind", ["branch", "merge"])
def test_layers_without_blocks_in_another_program_s_int4(
    kind: str, genai_graph: Callable[..., Path], tiny_model: Get, tmp_path: Path
) -> None:
    """They are rounded too and have no marks: torch's in their place would be blamed on the layer behind them."""
    adapter = tiny.make_adapter(tiny_model("qwen2"), tmp_path / "a", targets=("k_proj", "up_proj"))
    graph, out = genai_graph("qwen2", "int4"), tmp_path / "out"
    if kind == "branch":
        exports.branched(graph, {"a": adapter}, out)
    else:
        exports.merged(graph, adapter, out, method="refit")
    report = parity(out, model=tiny_model("qwen2"), **BOUNDS)
    assert report["first_divergent_module"] is None
    names = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    assert set(rows(report)) >= {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names}
    assert all(row["input_sqnr_db"] > 100 for row in report["modules"])  # as of this program's own, above


@pytest.mark.slow  # an export by torch, another for the web
def test_the_other_kinds_of_export(
    exported: Callable[..., Path], tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    hf = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "hf", format="hf")
    for out in (hf, exported("llama", for_="web"), exported("gpt2")):
        report = parity(out, **BOUNDS)
        assert len(report["modules"]) >= 9 and report["first_divergent_module"] is None
        # the same weights in float32; equal sums have no noise, and JSON no infinity
        assert all(row["local_sqnr_db"] is None or row["local_sqnr_db"] > 100 for row in report["modules"])


def test_codes_fitted_to_outputs_are_not_taken_for_a_fault(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """Calibrated codes lie steps away from the weights; broken ones are told from them all the same."""
    out = exports.merged(
        tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", quantize="int4", method="calibrated",
        min_survival=0.01,
    )  # fmt: skip
    report = parity(out, **BOUNDS)
    assert report["first_divergent_module"] is None
    ratios = [row["fitted_error_ratio"] for row in report["modules"]]
    assert 0 < max(ratios) < 8 and max(row["worst_group_steps"] for row in report["modules"]) < 0.9
    entry = read_manifest(out)["modules"][3]
    stored = {t.name: t for t in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer}
    place = {pair.key: pair.value for pair in stored[entry["weight"]].external_data}
    content = bytearray((out / "model.onnx.data").read_bytes())
    codes = slice(int(place["offset"]), int(place["offset"]) + int(place["length"]))
    content[codes] = bytes(code ^ 0xFF for code in content[codes])  # code c becomes 15 − c: the weights' signs turn
    (out / "model.onnx.data").write_bytes(content)
    broken = parity(exports.announce(out), **BOUNDS)
    assert (broken["first_divergent_module"], broken["verdict"]) == (entry["name"], "fail")


def test_one_group_that_is_not_what_was_fitted_is_named(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """Far below what fitting moves weights by, and no digest of a file tells: the manifest says what was chosen."""
    out = exports.merged(
        tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", quantize="int4", method="calibrated",
        min_survival=0.01,
    )  # fmt: skip
    entry = read_manifest(out)["modules"][5]
    stored = {t.name: t for t in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer}
    at = next(int(pair.value) for pair in stored[entry["weight"]].external_data if pair.key == "offset")
    exports.flip_byte(out / "model.onnx.data", at)  # the first code of the first group, by one
    report = parity(exports.announce(out), **BOUNDS)
    found = rows(report)[entry["name"]]
    assert (found["fault"], report["first_divergent_module"]) == ("weights", entry["name"])
    assert found["fitted_error_ratio"] < 8 and found["worst_group_steps"] < 0.9  # neither of which sees it
    assert [name for name, row in rows(report).items() if row["fault"]] == [entry["name"]]


def test_modules_can_be_left_out(exported: Callable[..., Path]) -> None:
    report = parity(exported("llama"), modules=False, **BOUNDS)
    assert (report["modules"], report["first_divergent_module"]) == ([], None)
    assert not any(name.startswith("modules") for name in exports.checks(report))


def test_sequences_are_cut_to_what_memory_allows() -> None:
    def sample(length: int) -> Sample:
        return Sample(np.arange(length), np.ones(length, np.bool_))

    runs = twins._pieces([sample(3), sample(300), sample(2000), sample(40)], 100, decodes=True)
    # a sixteenth of 2343 tokens, 146: the first of the longest as far as memory goes, the rest of the next
    assert [[len(piece) for piece in pieces] for pieces in runs] == [[96, 1, 1, 1, 1], [46]]
    assert [sum(map(len, pieces)) for pieces in twins._pieces([sample(30)] * 9, 100, decodes=False)] == [30, 30]
    assert [len(piece) for piece in twins._pieces([sample(3)], 100, decodes=True)[0]] == [3]
    assert sum(sum(map(len, pieces)) for pieces in twins._pieces([sample(1000)] * 9, 100, decodes=False)) == 256
    wide = torch.nn.Linear(4096, 1 << 17, device="meta")
    network = torch.nn.Sequential(wide)
    # a reference of 2 GiB may hold a quarter of it: 255 tokens' inputs of 16 KB and outputs of 0.5 MB in four models
    assert twins._tokens(network, {"0": wide}) == min(128, (1 << 29) // (4 * (4096 + 4 * (1 << 17))))
    narrow = torch.nn.Linear(64, 1 << 21, device="meta")
    assert twins._tokens(torch.nn.Sequential(narrow), {"0": narrow}) == 16  # never fewer


def test_taps_show_what_the_graph_and_torch_give(
    exported: Callable[..., Path], tiny_model: Get, tiny_adapter: Get
) -> None:
    """The values of one module are the ones that its own weight makes of its input, in pieces as in one."""
    network, _ = load_tuned(tiny_model("llama"), Adapter.load(tiny_adapter("llama")))
    name = "model.layers.1.mlp.up_proj"
    taps, ids = TorchTaps(network, False, [name]), np.arange(3, 15)
    (whole,) = taps.see([ids])
    x, y = whole[name]
    weight = network.get_submodule(name).base.weight.detach().numpy()
    np.testing.assert_allclose(y, x @ weight.T, atol=1e-5)  # sums of 64 products of order 1
    parts = [seen[name][1] for seen in taps.see([ids[:9], ids[9:10], ids[10:]])]
    np.testing.assert_allclose(np.concatenate(parts), y, atol=1e-5)
    out = exported("llama")
    places = Graph(out / "model.onnx").places(read_manifest(out)["modules"], {name: False})
    assert list(places) == [name] and places[name].parts[0].y.endswith("/diablo")
