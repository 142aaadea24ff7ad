"""Given ONNX models: what belongs to them, under whatever name and in whatever layout they come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_file import find
from diablo_export.errors import InputError
from diablo_export.patch import apply, create
from tests.onnx_runs import runner

Get = Callable[..., Path]
BESIDE = {"genai_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def named(genai_graph: Get, tmp_path: Path) -> Path:
    """A model folder as published ones are: the graph has a name of its own, which genai_config.json gives."""
    folder = Path(shutil.copytree(genai_graph("llama", "int4").parent, tmp_path / "named"))
    (folder / "model.onnx").rename(folder / "tiny-cpu-int4.onnx")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "tiny-cpu-int4.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def _names(model: Path) -> set[str]:
    found = find(model)
    assert found is not None
    return {path.name for path in found.others}


def test_a_graph_of_another_name_keeps_what_lies_beside_it(named: Path) -> None:
    assert _names(named) >= BESIDE
    assert _names(named / "tiny-cpu-int4.onnx") >= BESIDE


def test_a_graph_below_its_repository(named: Path) -> None:
    (named / "onnx").mkdir()
    for file in named.glob("*.onnx*"):
        file.rename(named / "onnx" / file.name)
    assert _names(named / "onnx") >= BESIDE
    assert _names(named / "onnx/tiny-cpu-int4.onnx") >= BESIDE


def test_weights_of_others_are_left_out(named: Path) -> None:
    for name in ("decoder_with_past_model.onnx_data", "pytorch_model.bin", "openvino_model.bin", "tiny.gguf"):
        (named / name).write_bytes(b"weights of the base")
    kept = _names(named)
    assert kept >= BESIDE
    assert not [name for name in kept if name.endswith((".onnx_data", ".bin", ".gguf"))]


@pytest.mark.parametrize("base", ["onnx", "hf"])
def test_what_was_said_of_the_base_is_not_said_of_a_merge(
    base: str, named: Path, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    model = named if base == "onnx" else Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    for report in ("parity.json", "certificate.json", "certificate.npz"):
        (model / report).write_text("{}")
    merge(model, tiny_adapter("llama"), tmp_path / "out", **({"method": "rtn"} if base == "onnx" else {}))
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(("parity", "certif"))]


def test_a_file_among_strangers_is_alone(named: Path, tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    for file in named.glob("*.onnx*"):
        shutil.copyfile(file, folder / file.name)
    (folder / "letter.txt").write_text("private")
    assert _names(folder / "tiny-cpu-int4.onnx") == set()


def test_a_merge_of_it_can_be_run_by_genai(named: Path, tiny_adapter: Get, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")

    merge(named, tiny_adapter("llama"), tmp_path / "out")
    config = json.loads((tmp_path / "out/genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "model.onnx"
    genai.Model(str(tmp_path / "out"))  # raises where the file that it names is not there


def test_a_patch_keeps_the_name_that_a_device_knows(named: Path, tiny_adapter: Get, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")

    merge(named, tiny_adapter("llama"), tmp_path / "out")
    before = (named / "genai_config.json").read_bytes()
    create(named, tmp_path / "out", tmp_path / "tiny.patch")
    apply(named, tmp_path / "tiny.patch")
    assert (named / "genai_config.json").read_bytes() == before
    assert not (named / "model.onnx").exists()
    assert np.array_equal(runner(named / "tiny-cpu-int4.onnx")(), runner(tmp_path / "out/model.onnx")())
    genai.Model(str(named))


@pytest.mark.parametrize("where", ["node", "graph", "metadata"])
def test_text_that_is_not_utf_8_is_refused_before_any_work(where: str, tmp_path: Path) -> None:
    x = ir.val("x", ir.DataType.FLOAT, (1, 4))
    weight = ir.Value(name="w", const_value=ir.tensor(np.eye(4, dtype=np.float32), name="w"))
    node = ir.node("MatMul", [x, weight], name="the node")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 17}, name="the graph")
    file = tmp_path / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10, metadata_props={"the metadata": "said"}), file)
    file.write_bytes(file.read_bytes().replace(f"the {where}".encode(), f"the {where}".encode()[:-1] + b"\xff"))
    with pytest.raises(InputError, match=rf"model\.onnx: the .*b'the {where[:-1]}\\xff'.* is not UTF-8"):
        find(file)
