from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.checkpoint import Checkpoint, write_safetensors
from diablo_export.converters import genai_graph, torch_graph
from diablo_export.converters.onnx_graph import build_graph
from diablo_export.converters.onnx_trial import try_graph
from diablo_export.errors import CheckpointError, ExportError, InputError, MatchError
from tests import graphs, tiny


def copy_of(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model folder with another config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_hashes_and_files(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    graph = build_graph(tiny_model("llama"), tmp_path, quantize="int4")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert graph.hashes.items() <= files.items()
    assert set(graph.hashes) == {"model.onnx", "model.onnx.data"}
    wanted = {"genai_config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == set(graph.hashes) | wanted
    assert (graph.exporter, "LlamaForCausalLM" in graph.reason) == ("genai", True)


def test_every_wrong_option_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        build_graph("x", tmp_path, task="translation", quantize="int3", precision="bf16", accuracy_level=9)
    for part in (
        "task is 'translation'",
        "quantize is 'int3'",
        "none, int8, int4",
        "precision is 'bf16'",
        "level is 9",
    ):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="groups of 48"):
        build_graph("x", tmp_path, quantize="int4", group_size=48)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("eetq", r"quantized with eetq, where gptq, .* can be read; give the float model"),
        ("gptq", r"says gptq, but no weight is stored so \(no tensor is called \*\.qweight\); give the float model"),
    ],
)
def test_quantized_checkpoint_that_cannot_be_read(
    method: str, message: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = copy_of(tiny_model("llama"), tmp_path / "m", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match=message):
        build_graph(model, tmp_path)


def test_missing_weight_is_named_and_no_other_road_is_tried(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(tiny_model("llama"), tmp_path / "m")
    whole = {info.name: info.read() for info in Checkpoint.open(tiny_model("llama"))}
    del whole["model.layers.1.mlp.up_proj.weight"]
    layout = {name: ("F32", value.shape) for name, value in whole.items()}
    write_safetensors(model / "model.safetensors", layout, whole.items())
    monkeypatch.setattr(torch_graph, "layout", lambda *a, **k: pytest.fail("tried the other road"))
    with pytest.raises(CheckpointError, match=r"no tensor for the parameter model\.layers\.1\.mlp\.up_proj\.weight"):
        build_graph(model, tmp_path)


def test_graph_that_the_runtime_refuses_takes_the_other_road(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head size of 8, had it not been asked about first: the builder accepts it, onnxruntime does not."""
    model = tiny.make_model("llama", tmp_path / "m", head_dim=8)
    monkeypatch.setattr(genai_graph, "_HEAD_SIZE_STEP", 1)
    seen: list[set[str]] = []

    def refuse(weights: Any, folder: Path, **options: Any) -> Any:
        seen.append({path.name for path in folder.iterdir()})
        raise ExportError("not today")

    monkeypatch.setattr(torch_graph, "layout", refuse)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("stays")
    with pytest.raises(ExportError) as caught:
        build_graph(model, tmp_path / "out")
    assert "onnxruntime-genai: onnxruntime refuses the graph" in str(caught.value)
    assert "head_size" in str(caught.value) and "torch: not today" in str(caught.value)
    assert seen == [{"mine.txt"}]  # nothing of the first road is left


def test_architecture_that_nobody_has(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy_of(tiny_model("llama"), tmp_path / "m", model_type="nonsense", architectures=["NonsenseForCausalLM"])
    with pytest.raises(ExportError, match=r"(?s)onnxruntime-genai: NonsenseForCausalLM.*torch: .*nonsense"):
        build_graph(model, tmp_path)


def test_missing_genai_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = genai_graph.refusal({"architectures": ["LlamaForCausalLM"], "head_dim": 16})
    assert said is not None and "diablo-export[genai]" in said


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    x = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(("batch", "sequence")))
    zero = ir.node("Cast", [x], {"to": ir.DataType.FLOAT})
    log = ir.node("Log", [ir.node("Sub", [zero.outputs[0], zero.outputs[0]]).outputs[0]])
    sub = log.inputs[0].producer()  # type: ignore[union-attr]
    log.outputs[0].name, log.outputs[0].type = "logits", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [log.outputs[0]], nodes=[zero, sub, log], opset_imports={"": 20}, name="g")  # type: ignore[list-item]
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="not finite"):
        try_graph(tmp_path / "model.onnx")


def test_module_that_cannot_be_merged_is_listed(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.embed_tokens"
    module = AdaptedModule(name, np.zeros((4, 16, 80), np.float32), 64, 320)
    with pytest.raises(MatchError, match=r"1 of the adapter's modules .*\n  model\.embed_tokens: no linear node"):
        build_graph(tiny_model("llama"), tmp_path, merged=Adapter({name: module}))


def test_saved_parameters_replace_the_models(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole modules that an adapter brings, here a head and a norm, are written in place of the checkpoint's."""
    model = tiny_model("llama")
    norm = np.full(64, 0.5, np.float32)
    head = np.random.default_rng(0).normal(0, 0.1, (320, 64)).astype(np.float32)
    adapter = Adapter({}, saved={"lm_head.weight": head, "model.norm.weight": norm})
    build_graph(model, tmp_path, head=adapter)
    network = graphs.hugging_face(model)
    network.lm_head.weight = torch.nn.Parameter(torch.from_numpy(head))
    network.model.norm.weight = torch.nn.Parameter(torch.from_numpy(norm))
    got = graphs.in_steps(graphs.open_session(tmp_path), graphs.IDS, 12)
    # float32 in another order of additions
    np.testing.assert_allclose(got, graphs.logits_of(network, graphs.IDS), rtol=0, atol=5e-5)
