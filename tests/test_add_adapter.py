from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from diablo_export.adapter import Adapter, file_sha256
from diablo_export.converters.export import export
from diablo_export.errors import AdapterError, InputError, MatchError, OutputError
from diablo_export.manifest import read_manifest
from diablo_export.measure.parity import parity
from tests import tiny
from tests.exports import SMALL, merged
from tests.onnx_runs import LOGITS, in_torch, runner

Get = Callable[..., Path]


@pytest.fixture
def folder(exported: Get, tmp_path: Path) -> Path:
    """A copy of the export with the adapters a and b."""
    return Path(shutil.copytree(exported("llama"), tmp_path / "out"))


@pytest.fixture
def third(tiny_model: Get, tmp_path: Path) -> Path:
    return tiny.make_adapter(tiny_model("llama"), tmp_path / "third", num_blocks=16, seed=3)


def test_a_third_adapter(
    folder: Path, third: Path, tiny_model: Get, tiny_adapter: Get, run: Callable[..., Result]
) -> None:
    before = {path: file_sha256(path) for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"}
    reports = [folder / name for name in ("parity.json", "certificate.json", "certificate.npz")]
    for report in reports:
        report.write_text("{}")
    done = run("export", "-m", tiny_model("llama"), "-a", f"c={third}", "-o", folder, "--add")
    assert done.exit_code == 0, done.output
    assert {path: file_sha256(path) for path in before} == before
    assert not any(report.exists() for report in reports), "they have not seen this adapter"
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    logits = runner(folder / "model.onnx")
    for name, source in (("c", third), ("a", tiny_adapter("llama"))):
        tuned = logits(folder / f"adapters/{name}.onnx_adapter")
        np.testing.assert_allclose(tuned, in_torch(tiny_model("llama"), source), rtol=0, atol=LOGITS)
    manifest = read_manifest(folder)
    assert [entry["name"] for entry in manifest["adapters"]] == ["a", "b", "c"]
    assert all("c" in module["adapters"] for module in manifest["modules"])
    assert parity(folder, adapter="c", **SMALL)["verdict"] == "pass"


def test_an_adapter_is_replaced_only_when_told(folder: Path, third: Path, tiny_model: Get) -> None:
    with pytest.raises(OutputError, match=r"has an adapter b already; name .* or replace it with --overwrite"):
        export(tiny_model("llama"), {"b": third}, folder, add=True)
    manifest = export(tiny_model("llama"), {"b": third}, folder, add=True, overwrite=True)
    assert [entry["name"] for entry in manifest["adapters"]] == ["a", "b"]
    assert all(module["adapters"] == ["a", "b"] for module in manifest["modules"])
    tuned = runner(folder / "model.onnx")(folder / "adapters/b.onnx_adapter")
    np.testing.assert_allclose(tuned, in_torch(tiny_model("llama"), third), rtol=0, atol=LOGITS)


def test_of_several_that_replace_others_all_are_written_or_none(
    exported: Get, third: Path, tiny_model: Get, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(exported("llama", block_dtype="fp16"), tmp_path / "out"))
    large = Adapter.load(third)
    for module in large.modules.values():
        module.blocks[:] = 1e6  # above float16's largest, 65504
    (tmp_path / "large").mkdir()
    large.save(tmp_path / "large")
    before = {path: file_sha256(path) for path in out.rglob("*") if path.is_file()}
    with pytest.raises(AdapterError, match="large: values too large for float16"):
        export(tiny_model("llama"), {"a": third, "b": tmp_path / "large"}, out, add=True, overwrite=True)
    assert {path: file_sha256(path) for path in out.rglob("*") if path.is_file()} == before


def test_int8_folders_get_int8_adapters(exported: Get, third: Path, tiny_model: Get, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported("llama", block_dtype="int8"), tmp_path / "out"))
    manifest = export(tiny_model("llama"), {"c": third}, out, add=True)
    assert all(0 < module["block_error"]["c"] < 0.02 for module in manifest["modules"])
    size = (out / "adapters/c.onnx_adapter").stat().st_size
    assert size < sum(module.blocks.nbytes for module in Adapter.load(third).modules.values())


def test_an_onnx_base(genai_graph: Get, tiny_adapter: Get, third: Path, tmp_path: Path) -> None:
    base = genai_graph("llama", "int4")
    export(base, {"a": tiny_adapter("llama")}, tmp_path / "out")
    manifest = export(base, {"c": third}, tmp_path / "out", add=True)
    assert [entry["name"] for entry in manifest["adapters"]] == ["a", "c"]
    with pytest.raises(InputError, match="was exported from another base"):
        export(genai_graph("llama", "fp32"), {"d": third}, tmp_path / "out", add=True)


# -------------------------------------------------------------------------------------------------- what it refuses


def test_another_base(folder: Path, tmp_path: Path) -> None:
    """The same sizes, other weights: the adapter fits its own base, but that is not the folder's."""
    other = tiny.make_model("llama", tmp_path / "other", seed=9)
    adapter = tiny.make_adapter(other, tmp_path / "x")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=r"was exported from another base, .* than .*other"):
        export(other, adapter, folder, add=True)
    assert sorted(folder.rglob("*")) == before


def test_modules_without_a_branch(other_adapter: Get, third: Path, tiny_model: Get, tmp_path: Path) -> None:
    export(tiny_model("llama"), {"b": other_adapter("llama")}, tmp_path / "out")  # the last layer alone
    with pytest.raises(MatchError, match=r"no branch for 7 of its 14 modules \(model\.layers\.0"):
        export(tiny_model("llama"), {"c": third}, tmp_path / "out", add=True)


def test_another_head(folder: Path, third: Path, tiny_model: Get, tmp_path: Path) -> None:
    (tmp_path / "headed").mkdir()
    saved = {"score.weight": np.zeros((2, 64), np.float32)}
    dataclasses.replace(Adapter.load(third), saved=saved).save(tmp_path / "headed")
    with pytest.raises(AdapterError, match=r"is a CAUSAL_LM adapter with the head \{'score.weight': \[2, 64\]\}"):
        export(tiny_model("llama"), {"c": tmp_path / "headed"}, folder, add=True)


@pytest.mark.parametrize("options", [{"quantize": "int4"}, {"block_dtype": "int8"}, {"for_": "web"}])
def test_other_options(options: dict[str, Any], folder: Path, third: Path, tiny_model: Get) -> None:
    with pytest.raises(InputError, match="keeps its graph as it is; give no option but"):
        export(tiny_model("llama"), {"c": third}, folder, add=True, **options)


def test_folders_that_take_none(third: Path, exported: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        export(tiny_model("llama"), {"c": third}, tmp_path / "gone", add=True)
    out = merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "merged", format="hf")
    with pytest.raises(InputError, match="was made by merge; adapters can be added to branch exports"):
        export(tiny_model("llama"), {"c": third}, out, add=True)
    with pytest.raises(InputError, match="was exported for the web; export it again"):
        export(tiny_model("llama"), {"c": third}, exported("llama", for_="web"), add=True)
