from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from safetensors import safe_open
from safetensors.numpy import load_file

from diablo_export.converters.export import export
from diablo_export.converters.inspection_onnx import inspect_onnx
from diablo_export.errors import InputError
from diablo_export.manifest import read_manifest
from diablo_export.measure.parity import parity
from tests.exports import SMALL, failed
from tests.onnx_runs import runner

Get = Callable[..., Path]


@pytest.mark.parametrize(("architecture", "quantize"), [("llama", "none"), ("llama", "int4"), ("bert", "none")])
def test_fed_from_safetensors_it_is_the_other_export(architecture: str, quantize: str, exported: Get) -> None:
    swap, web = exported(architecture, quantize), exported(architecture, quantize, "web")
    wanted, run = runner(swap / "model.onnx"), runner(web / "model.onnx")
    for name in ("a", "b", "base", "a"):
        fed = run(more=load_file(web / f"adapters/{name}.safetensors"))
        adapter = None if name == "base" else swap / f"adapters/{name}.onnx_adapter"
        np.testing.assert_array_equal(fed, wanted(adapter))  # one graph in the same kernels
    with pytest.raises(ValueError, match=r"Required inputs .*diablo_blocks.* are missing"):
        run()


@pytest.mark.parametrize("block_dtype", ["int8", "fp16"])
def test_blocks_in_fewer_bits(block_dtype: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    for for_ in ("ort", "web"):
        export(tiny_model("llama"), {"a": tiny_adapter("llama")}, tmp_path / for_, block_dtype=block_dtype, for_=for_)
    wanted, run = runner(tmp_path / "ort/model.onnx"), runner(tmp_path / "web/model.onnx")
    for name, adapter in (("a", tmp_path / "ort/adapters/a.onnx_adapter"), ("base", None)):
        fed = load_file(tmp_path / f"web/adapters/{name}.safetensors")
        np.testing.assert_array_equal(run(more=fed), wanted(adapter))
    report = parity(tmp_path / "web", **SMALL)
    # rounded blocks are a finding of their own, on which the other export's parity decides
    assert report["adapter"]["alive"] and report["adapter"]["survival_cosine"] > 0.99


def test_what_the_folder_holds(exported: Get) -> None:
    folder = exported("bert", for_="web")
    manifest = read_manifest(folder)
    assert (manifest["for"], manifest["options"]["for"]) == ("web", "web")
    assert manifest["no_adapter"] == "adapters/base.safetensors"
    assert [entry["file"] for entry in manifest["adapters"]] == ["adapters/a.safetensors", "adapters/b.safetensors"]
    assert {manifest["no_adapter"], "adapters/a.safetensors"} <= manifest["files"].keys()
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    inputs = {value.name for value in graph.input}
    assert not inputs & {tensor.name for tensor in graph.initializer}
    files = {name: load_file(folder / f"adapters/{name}.safetensors") for name in ("a", "b", "base")}
    fed = {"input_ids", "attention_mask", "token_type_ids"}
    assert all(values.keys() == inputs - fed for values in files.values())
    for name in files:
        with safe_open(folder / f"adapters/{name}.safetensors", "np") as opened:
            assert opened.metadata() == {"diablo.base": manifest["diablo.base"]}
    assert (folder / "adapters/a.safetensors").stat().st_mode & 0o444 == 0o444, "a web server must read it"
    for name, value in files["base"].items():  # no blocks, and the first adapter's head
        if name.endswith(".diablo_blocks"):
            assert value.shape == (0, 0, 0)
        else:
            np.testing.assert_array_equal(value, files["a"][name])
            assert not np.array_equal(value, files["b"][name])


def test_genai_is_not_told_of_it(exported: Get) -> None:
    assert (exported("llama") / "genai_config.json").is_file()
    assert not (exported("llama", for_="web") / "genai_config.json").exists()
    assert "genai_config.json" not in read_manifest(exported("llama", for_="web"))["files"]
    assert read_manifest(exported("llama"))["for"] == "ort"


def test_inspect_lists_the_adapters(exported: Get) -> None:
    report = inspect_onnx(exported("llama", for_="web"))
    assert [(entry["name"], entry["adapted_modules"]) for entry in report["adapters"]] == [
        ("a", 14), ("b", 7), ("base", 0),
    ]  # fmt: skip
    assert (report["branches"], report["overridable_inputs"], report["genai"]) == (14, 0, False)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_parity_holds(architecture: str, exported: Get, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported(architecture, for_="web"), tmp_path / "out"))
    report = parity(out, **SMALL)
    assert report["verdict"] == "pass", failed(report)
    assert report["adapter"]["alive"]


def test_parity_sees_another_adapters_blocks(exported: Get, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported("llama", for_="web"), tmp_path / "out"))
    shutil.copyfile(out / "adapters/b.safetensors", out / "adapters/a.safetensors")
    report = parity(out, adapter=["a"], **SMALL)
    assert {"kl.max", "adapter.survival_gain.error"} <= failed(report)
    (out / "adapters/a.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be read .*export the folder again"):
        parity(out, adapter=["a"], **SMALL)


def test_names_and_targets_that_cannot_be(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    model, adapter = tiny_model("llama"), tiny_adapter("llama")
    with pytest.raises(InputError, match=r"adapter name 'base': --for web writes adapters/base\.safetensors"):
        export(model, {"base": adapter}, tmp_path / "out", for_="web")
    with pytest.raises(InputError, match=r"for_ is 'tpu'; it is one of ort, web"):
        export(model, adapter, tmp_path / "out", for_="tpu")
    assert not (tmp_path / "out").exists()


def test_command(run: Callable[..., Result], tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    given = ["--model", tiny_model("llama"), "--adapter", f"one={tiny_adapter('llama')}", "--output", tmp_path / "out"]
    result = run("export", *given, "--for", "web")
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "out/adapters").iterdir()) == [
        "base.safetensors", "one.safetensors",
    ]  # fmt: skip
