from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import diablo_export
from diablo_export.adapter import Adapter, file_sha256
from diablo_export.block_storage import BLOCKS_SUFFIX, SCALES_SUFFIX
from diablo_export.converters.export import export, load_adapters
from diablo_export.errors import AdapterError, ExportError, InputError, MatchError, OutputError
from diablo_export.manifest import base_sha256, file_xxh3, read_manifest
from tests import tiny
from tests.onnx_runs import LOGITS, in_torch, runner
from tests.test_onnx_match import without_branches

Get = Callable[..., Path]
ROADS = {name: "torch" if name in tiny.BY_TORCH else "genai" for name in tiny.ARCHITECTURES}


def plain(folder: Path, to: Path) -> Path:
    """The exported graph with branches and their inputs taken out again: the base as exported, a head still to be fed.

    A head that cannot be fed is packed for its product beforehand, which adds in another order.
    """
    model = without_branches(ir.load(folder / "model.onnx"))
    for value in [value for value in model.graph.inputs if (value.name or "").endswith((BLOCKS_SUFFIX, SCALES_SUFFIX))]:
        model.graph.inputs.remove(value)
    model.functions.clear()
    shutil.copyfile(folder / "model.onnx.data", to / "model.onnx.data")
    ir.save(model, to / "model.onnx")
    return to / "model.onnx"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture(
    architecture: str, exported: Get, tiny_model: Get, tiny_adapter: Get, other_adapter: Get, tmp_path: Path
) -> None:
    folder = exported(architecture)
    model, sources = tiny_model(architecture), {"a": tiny_adapter(architecture), "b": other_adapter(architecture)}
    manifest = read_manifest(folder)
    assert manifest["exporter"] == ROADS[architecture]
    run = runner(folder / "model.onnx")
    base = run()
    assert np.array_equal(base, runner(plain(folder, tmp_path))()), "unfed it must be the base bit for bit"
    if architecture != "bert":  # a classifier without adapter still has the first adapter's head
        np.testing.assert_allclose(base, in_torch(model), rtol=0, atol=LOGITS)
    for name, source in sources.items():  # 4 and 8 blocks in one session
        tuned = run(folder / f"adapters/{name}.onnx_adapter")
        np.testing.assert_allclose(tuned, in_torch(model, source), rtol=0, atol=LOGITS)
        assert np.abs(tuned - base).max() > 1000 * LOGITS
    assert np.array_equal(run(), base), "nothing of an adapter may stay behind"


@pytest.mark.parametrize(
    ("architecture", "quantize", "name"),
    [
        ("llama", "int8", "model.layers.0.mlp.up_proj"),
        ("llama", "int4", "model.layers.0.mlp.up_proj"),
        ("qwen2", "int4", "model.layers.0.mlp.up_proj"),
        # onnxruntime fuses a bias with MatMulNBits, with Gelu or with LayerNormalization: a branch must hinder none
        pytest.param("bert", "int4", "bert.encoder.layer.0.output.dense", marks=pytest.mark.slow),
        pytest.param("gpt2", "int4", "transformer.h.0.mlp.c_fc", marks=pytest.mark.slow),
    ],
)
def test_quantized_base_with_float_blocks(
    architecture: str, quantize: str, name: str, exported: Get, tmp_path: Path
) -> None:
    folder = exported(architecture, quantize)
    run = runner(folder / "model.onnx")
    base = run()
    assert np.array_equal(base, runner(plain(folder, tmp_path))())
    assert np.abs(run(folder / "adapters/a.onnx_adapter") - base).max() > 0.5
    module = next(m for m in read_manifest(folder)["modules"] if m["name"] == name)
    group_size = 16 if architecture == "bert" else 32
    assert (module["layout"], module["bits"], module["group_size"]) == ("MatMulNBits", int(quantize[3:]), group_size)


def test_quantized_base_differs_from_tuned_only_by_the_base(exported: Get, tiny_model: Get, tiny_adapter: Get) -> None:
    # int8 of random weights moves the logits by a few percent; the adapter's effect is several times that
    run = runner(exported("llama", "int8") / "model.onnx")
    effect = run(exported("llama", "int8") / "adapters/a.onnx_adapter") - run()
    wanted = in_torch(tiny_model("llama"), tiny_adapter("llama")) - in_torch(tiny_model("llama"))
    cosine = float((effect * wanted).sum() / np.linalg.norm(effect) / np.linalg.norm(wanted))
    assert cosine > 0.99


def test_half_precision(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    export(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", precision="fp16")
    inputs = {v.name: v for v in onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.input}
    assert inputs["model.layers.0.mlp.up_proj.diablo_blocks"].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    run = runner(tmp_path / "out/model.onnx")
    tuned = run(tmp_path / "out/adapters/adapter.onnx_adapter").astype(np.float32)
    # weights, blocks and activations rounded to 2^-11 of themselves, logits near 10, two layers
    np.testing.assert_allclose(tuned, in_torch(tiny_model("llama"), tiny_adapter("llama")), rtol=0, atol=0.1)


def test_blocks_that_half_precision_cannot_hold(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    whole = Adapter.load(tiny_adapter("llama"))
    name, one = next(iter(whole.modules.items()))
    huge = {**whole.modules, name: dataclasses.replace(one, blocks=one.blocks * np.float32(1e7))}
    adapter = changed(tiny_adapter("llama"), tmp_path / "huge", modules=huge)
    with pytest.raises(
        AdapterError, match=rf"too large for float16: {name}\.diablo_blocks \(up to \d.*--precision fp32"
    ):
        export(tiny_model("llama"), adapter, tmp_path / "out", precision="fp16")


def test_adapters_larger_than_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diablo_export.converters import onnx_adapters

    monkeypatch.setattr(onnx_adapters, "_LIMIT", 100)
    with pytest.raises(
        ExportError, match=r"a\.onnx_adapter: 0\.0 GB of blocks, an \.onnx_adapter file holds less than"
    ):
        onnx_adapters.write_onnx_adapter(tmp_path / "a.onnx_adapter", {"x": np.zeros(100, np.float32)})


def test_manifest_and_files(exported: Get, tiny_model: Get, tiny_adapter: Get) -> None:
    folder = exported("llama")
    manifest = read_manifest(folder)
    names = {"config.json", "genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"}
    assert names | {"adapters/a.onnx_adapter", "adapters/b.onnx_adapter"} <= manifest["files"].keys()
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    assert manifest["command"] == "export"
    files = {"model.safetensors": file_xxh3(tiny_model("llama") / "model.safetensors")}
    assert manifest["base"] == {
        "path": str(tiny_model("llama").resolve()),
        "id": str(tiny_model("llama")),
        "sha256": base_sha256(files),
        "files": files,
    }
    assert [(a["name"], a["file"]) for a in manifest["adapters"]] == [
        ("a", "adapters/a.onnx_adapter"), ("b", "adapters/b.onnx_adapter"),
    ]  # fmt: skip
    assert (manifest["task"], manifest["quantize"], manifest["precision"]) == ("causal-lm", "none", "fp32")
    modules = {module["name"]: module for module in manifest["modules"]}
    assert modules.keys() == Adapter.load(tiny_adapter("llama")).modules.keys()
    up = modules["model.layers.0.mlp.up_proj"]
    assert (up["action"], up["layout"], up["transposed"], up["adapters"]) == ("branch", "MatMul", True, ["a"])
    assert modules["model.layers.1.mlp.up_proj"]["adapters"] == ["a", "b"]
    assert "values agree (cosine 1.000)" in up["why"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert {up["node"], up["weight"]} <= {node.name for node in graph.node} | {t.name for t in graph.initializer}


def test_heads_are_swapped_with_their_adapter(exported: Get, tiny_model: Get, other_adapter: Get) -> None:
    folder = exported("bert")
    opened = runner(folder / "model.onnx")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(folder / "model.onnx"))
    inputs = {value.name for value in proto.graph.input}
    assert {"classifier.weight", "classifier.bias"} <= inputs
    # the other adapter's head is the first one's negative: without its blocks the logits change sign
    head = Adapter.load(other_adapter("bert")).saved
    np.testing.assert_allclose(opened(more=head), -opened(), rtol=0, atol=1e-6)  # signs only
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    assert labels == {"0": "negative", "1": "positive"}


# ------------------------------------------------------------------------------------------- a model given as ONNX


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_onnx_of_another_builder(
    precision: str, genai_graph: Get, tiny_adapter: Get, tiny_model: Get, tmp_path: Path
) -> None:
    given = genai_graph("llama", precision)
    before = {path.name: file_sha256(path) for path in given.parent.iterdir() if path.is_file()}
    manifest = export(given.parent, tiny_adapter("llama"), tmp_path / "out")
    assert (manifest["exporter"], manifest["base"]["files"]["model.onnx"]) == ("given", file_xxh3(given))
    assert manifest["quantize"] == ("int4" if precision == "int4" else "none"), "parity goes by what the model is"
    data = "model.onnx.data"
    assert manifest["files"][data]["sha256"] == before[data], "external data must be copied as it is"
    assert "genai_config.json" in manifest["files"]
    assert {path.name: file_sha256(path) for path in given.parent.iterdir() if path.is_file()} == before
    query = next(m for m in manifest["modules"] if m["name"].endswith("0.self_attn.k_proj"))
    assert query["rows"] == [64, 96]
    run = runner(tmp_path / "out/model.onnx")
    assert np.array_equal(run(), runner(given)())
    if precision == "fp32":
        wanted = in_torch(tiny_model("llama"), tiny_adapter("llama"))
        np.testing.assert_allclose(run(tmp_path / "out/adapters/adapter.onnx_adapter"), wanted, rtol=0, atol=LOGITS)


def test_a_single_onnx_file(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    for path in genai_graph("llama", "fp32").parent.glob("model.onnx*"):
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "model.onnx").rename(tmp_path / "tiny.onnx")
    (tmp_path / "notes.txt").write_text("not a part of the model")
    manifest = export(tmp_path / "tiny.onnx", tiny_adapter("llama"), tmp_path / "out")
    assert manifest["files"].keys() == {"model.onnx", "model.onnx.data", "adapters/adapter.onnx_adapter"}


def test_an_onnx_model_is_not_converted(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is ONNX already and is taken as it is; leave out --quantize"):
        export(genai_graph("llama", "fp32"), tiny_adapter("llama"), tmp_path / "out", quantize="int4")


def test_an_onnx_model_of_another_base(tiny_adapter: Get, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("empty")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other = tiny.build_with_genai(tiny.make_model("llama", elsewhere / "model", seed=7), elsewhere / "onnx", "int4")
    with pytest.raises(MatchError, match=r"adapter adapter \(.*\): 14 of the 14 adapted modules") as caught:
        export(other, tiny_adapter("llama"), tmp_path / "out")
    assert "model.layers.0.self_attn.v_proj: /model/layers.0/attn/qkv_proj/MatMul_Q4 (name of the node)" in str(
        caught.value
    )
    assert not any(tmp_path.iterdir())


def test_an_export_is_no_base(exported: Get, tiny_adapter: Get, tiny_model: Get, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="was made by diablo-export export with the adapter a, b; give the base"
    ) as caught:
        export(exported("llama"), tiny_adapter("llama"), tmp_path / "out")
    assert str(tiny_model("llama").resolve()) in str(caught.value)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"no graph"), "cannot be read as ONNX"),
        (lambda folder: (folder / "model.onnx.data").unlink(), r"model\.onnx\.data: is missing"),
        (lambda folder: (folder / "model.onnx.data").write_bytes(b"short"), "has 5 bytes, the graph reads"),
        (lambda f: [(f / "model.onnx").rename(f / "a.onnx"), (f / "b.onnx").touch()], r"a\.onnx, b\.onnx; give one"),
        (lambda folder: (folder / "model.onnx").unlink(), r"config\.json: missing"),
    ],
)  # fmt: skip
def test_broken_onnx_models(
    breakage: Callable[[Path], Any], message: str, genai_graph: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in genai_graph("llama", "fp32").parent.glob("model.onnx*"):
        shutil.copyfile(path, folder / path.name)
    breakage(folder)
    with pytest.raises(InputError, match=message):
        export(folder, tiny_adapter("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ bad input


def changed(folder: Path, to: Path, **differences: Any) -> Path:
    to.mkdir()
    dataclasses.replace(Adapter.load(folder), **differences).save(to)
    return to


def test_another_base(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"14 of 14 modules do not fit[\s\S]*other values"):
        export(tiny_model("llama-tied"), tiny_adapter("qwen2"), tmp_path / "out")
    with pytest.raises(AdapterError, match="the model has no such weight"):
        export(tiny_model("gpt2"), tiny_adapter("llama"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_every_adapter_is_checked(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not belong to the model"):
        export(tiny_model("llama"), {"good": tiny_adapter("llama"), "bad": tiny_adapter("qwen2")}, tmp_path / "out")


def test_adapters_of_two_tasks(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapters of one task, .*x: CAUSAL_LM, y: SEQ_CLS"):
        export(tiny_model("llama"), {"x": tiny_adapter("llama"), "y": tiny_adapter("bert")}, tmp_path / "out")


def test_heads_of_two_sizes(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    three = {"classifier.weight": np.zeros((3, 64), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    other = changed(tiny_adapter("bert"), tmp_path / "three", saved=three)
    with pytest.raises(AdapterError, match="must have heads of the same shapes"):
        export(tiny_model("bert"), [tiny_adapter("bert"), other], tmp_path / "out")


def test_classes_in_another_order(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One config.json names the classes: it would name an answer as its opposite."""
    model, adapter, out = tiny_model("bert"), tiny_adapter("bert"), tmp_path / "out"
    turned = changed(adapter, tmp_path / "turned", labels=["positive", "negative"])
    wrong = r"turned\): has the classes positive, negative, .* negative, positive; .* a folder of its own"
    with pytest.raises(AdapterError, match=wrong):
        export(model, [adapter, turned], out)
    export(model, adapter, out)
    with pytest.raises(AdapterError, match=wrong):
        export(model, turned, out, add=True)
    mail = changed(adapter, tmp_path / "mail", labels=["ham", "spam"])
    with caplog.at_level("WARNING", "diablo_export"):
        export(model, mail, out, add=True)
    assert "has the classes ham, spam, config.json of the folder has negative, positive: its answers" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no adapter was given"),
        (["x={a}", "x={a}"], "adapter name 'x' was given twice"),
        (["a/b={a}"], "adapter name 'a/b': use letters"),
        (["={a}"], "adapter name '': use letters"),
        (["x=/nowhere"], "/nowhere: no such adapter folder"),
    ],
)
def test_adapter_names(given: list[str], message: str, tiny_adapter: Get) -> None:
    with pytest.raises(InputError, match=message):
        load_adapters([one.format(a=tiny_adapter("llama")) for one in given])


def test_a_folder_with_an_equals_sign(tiny_adapter: Get, tmp_path: Path) -> None:
    folder = tmp_path / "lr=3"
    shutil.copytree(tiny_adapter("llama"), folder)
    assert load_adapters(f"best={folder}").keys() == {"best"}
    with pytest.raises(InputError, match=r"adapter name 'lr=3'"):
        load_adapters(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"quantize": "int3"}, "quantize is 'int3'"), ({"precision": "bf16"}, "precision is 'bf16'"),
     ({"quantize": "int4", "group_size": 48}, "groups of 48"),
     ({"group_size": 32}, "--group-size: for the weights that --quantize rounds, and that is none")],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", **options)


def test_no_room(tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"about [\d.]+ MB will be written, [\d.]+ MB are free"):
        export(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")


def test_a_disk_that_fills_up(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diablo_export.converters.export.write_onnx_adapter", full)
    with pytest.raises(OutputError, match=r"the disk is full .* nothing was left behind"):
        export(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_graph_that_lost_a_module_is_an_error(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ir.load

    def lossy(file: Path) -> ir.Model:
        model = load(file)
        node = next(node for node in model.graph if node.name == "/model/layers.1/mlp/down_proj/MatMul")
        node.op_type, node.domain = "Unknown", "elsewhere"
        return model

    monkeypatch.setattr(ir, "load", lossy)
    with pytest.raises(
        MatchError, match=r"1 of the 14 adapted modules[\s\S]*layers\.1\.mlp\.down_proj: no linear node"
    ):
        export(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")


def test_overwrite_replaces_the_whole_folder(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        export(tiny_model("llama"), tiny_adapter("llama"), out)
    diablo_export.export(tiny_model("llama"), tiny_adapter("llama"), out, overwrite=True)
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
