"""What inspect says of everything that the road makes, and whether it needs torch for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export import patch
from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.converters.diablo_chkpt import convert
from diablo_export.converters.export import export
from diablo_export.converters.inspection import inspect
from diablo_export.converters.merge import merge
from diablo_export.errors import CheckpointError, InputError

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def outputs(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Output folders of a tiny Llama: an int4 merge, a Hugging Face merge, int4 with branches."""
    folder = tmp_path_factory.mktemp("outputs")
    model, adapter = tiny_model("llama"), tiny_adapter("llama")
    merge(model, adapter, folder / "int4", quantize="int4", method="rtn")
    merge(model, adapter, folder / "hf")
    export(model, {"style": adapter}, folder / "branch", quantize="int8")
    return lambda name: folder / name


def group(report: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    found = [row for row in report[key] if row["module"].endswith(name)]
    assert len(found) == 1
    return dict(found[0])


def test_adapter(tiny_adapter: Folder, tiny_model: Folder) -> None:
    report = inspect(tiny_adapter("llama"))
    assert report["kind"] == "DiaBlo adapter" and report["num_blocks"] == 4 and report["adapted_modules"] == 14
    assert report["parameters"] == Adapter.load(tiny_adapter("llama")).parameters
    assert "fits" not in report
    row = group(report, "modules", "down_proj")
    assert (row["count"], row["in_features"], row["out_features"], row["blocks"]) == (2, 96, 64, "4 × 24 × 16")
    assert (row["covered_outputs"], row["live_parameters"]) == ("100%", 2 * 4 * 24 * 16)


def test_adapter_of_a_quantized_base(tiny_adapter: Folder, tmp_path: Path) -> None:
    adapter = replace(Adapter.load(tiny_adapter("llama")), base_grid=BaseGrid(4, 32, symmetric=False, on_grid=True))
    adapter.save(tmp_path)
    said = inspect(tmp_path)["trained_beside"]
    assert said == "int4 in groups of 32, asymmetric weights, whose codes the blocks move"
    assert "trained_beside" not in inspect(tiny_adapter("llama"))


def test_adapter_beside_its_model_and_beside_another(tiny_adapter: Folder, tiny_model: Folder) -> None:
    assert inspect(tiny_adapter("llama"), model=tiny_model("llama"))["fits"] is True
    report = inspect(tiny_adapter("llama"), model=tiny_model("gpt2"))
    assert report["fits"] is False and "14 of 14 modules do not fit" in report["faults"]


def test_checkpoint_names_the_counts_that_divide(tiny_model: Folder) -> None:
    report = inspect(tiny_model("llama"))
    assert report["kind"] == "Hugging Face checkpoint" and report["model_type"] == "llama"
    row = group(report, "linear_layers", "self_attn.k_proj")
    assert (row["count"], row["in_features"], row["out_features"], row["dtype"]) == (2, 64, 32, "F32")
    assert row["num_blocks_that_divide"] == [1, 2, 4, 8, 16, 32]
    # q 64→64, k and v 64→32, up 64→96, down 96→64, two layers: (4096 + 2 · 2048 + 2 · 6144) · 2 / N
    assert {"num_blocks": 32, "parameters": 1280} in report["num_blocks_options"]


def test_checkpoint_of_transposed_layers(tiny_model: Folder) -> None:
    row = group(inspect(tiny_model("gpt2")), "linear_layers", "attn.c_attn")
    assert (row["in_features"], row["out_features"]) == (64, 192)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors", "nf4"])
def test_quantized_checkpoint_has_the_sizes_of_its_model(name: str, quantized: Folder, tiny_model: Folder) -> None:
    """And not those of the integers that its weights are packed into."""
    packed, plain = inspect(quantized(name)), inspect(tiny_model("llama"))
    assert packed["parameters"] == plain["parameters"]
    assert packed["num_blocks_options"] == plain["num_blocks_options"]
    method = "bitsandbytes" if name == "nf4" else name
    rows = [[{**row, "dtype": method} for row in report["linear_layers"]] for report in (packed, plain)]
    assert sorted(rows[0], key=str) == sorted(rows[1], key=str)
    assert {row["dtype"] for row in packed["linear_layers"]} == {method}


def test_checkpoint_beside_an_adapter(tiny_model: Folder, tiny_adapter: Folder) -> None:
    report = inspect(tiny_model("llama"), adapter=tiny_adapter("llama"))
    assert report["fits"] is True and report["adapter_modules_found"] == "14 of 14"
    report = inspect(tiny_model("bert"), adapter=tiny_adapter("llama"))
    assert report["fits"] is False and report["adapter_modules_found"] == "0 of 14"


def test_int4_merge(outputs: Folder) -> None:
    report = inspect(outputs("int4"))
    assert report["kind"] == "ONNX model" and report["branches"] == 0 and report["genai"] is True
    assert report["made_by"].endswith("merge") and report["modules_by_action"] == {"merged": 14}
    quantized = [row for row in report["linear_layers"] if row["layout"] == "MatMulNBits"]
    assert [(row["weights"], row["group_size"], row["symmetric"]) for row in quantized] == [("int4", 32, True)]
    assert quantized[0]["count"] == 15  # seven in each of two layers, and the head


def test_branches_and_their_adapters(outputs: Folder, tiny_adapter: Folder) -> None:
    report = inspect(outputs("branch"), adapter=tiny_adapter("llama"))
    assert (report["branches"], report["overridable_inputs"], report["carries_function"]) == (14, 14, True)
    assert report["linear_layers"][-1]["weights"] == "int8"
    (adapter,) = report["adapters"]
    assert (adapter["name"], adapter["adapted_modules"]) == ("style", 14)
    assert adapter["parameters"] == Adapter.load(tiny_adapter("llama")).parameters
    assert report["fits"] is True and len(report["matches"]) == 14
    assert any(signature.startswith("input_ids int64 [") for signature in report["inputs"])
    file = outputs("branch") / "adapters" / "style.onnx_adapter"
    assert inspect(file)["kind"] == "onnxruntime adapter"
    assert adapter["block_dtype"] == "float32"
    assert len(adapter["base_mark"]) == 8 and adapter["base_mark"] == report["base_mark"]


def test_an_onnx_model_beside_a_foreign_adapter(outputs: Folder, tiny_adapter: Folder) -> None:
    report = inspect(outputs("int4") / "model.onnx", adapter=tiny_adapter("gpt2"))
    assert report["fits"] is False and "could not be tied to the graph" in report["faults"]


def test_merged_checkpoint_is_a_checkpoint_and_an_output_folder(outputs: Folder) -> None:
    report = inspect(outputs("hf"))
    assert report["kind"] == "Hugging Face checkpoint" and report["modules_by_action"] == {"merged": 14}
    assert report["changed_files"] == []


def test_files_changed_since_are_named(outputs: Folder, tmp_path: Path) -> None:
    copy = shutil.copytree(outputs("hf"), tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    (copy / "generation_config.json").write_text("{}")
    assert inspect(copy)["changed_files"] == ["generation_config.json", "tokenizer.json"]


def test_parity_verdict_is_told(outputs: Folder, tmp_path: Path) -> None:
    copy = shutil.copytree(outputs("hf"), tmp_path / "copy")
    (copy / "parity.json").write_text(json.dumps({"verdict": "pass"}))
    assert inspect(copy)["parity"] == "pass"


def test_paper_checkpoint(tiny_adapter: Folder, tiny_model: Folder, tmp_path: Path) -> None:
    convert(tiny_adapter("llama"), tiny_model("llama"), tmp_path / "adapter.chkpt")
    report = inspect(tmp_path / "adapter.chkpt", model=tiny_model("llama"))
    assert report["kind"] == "adapter.chkpt of the DiaBlo paper" and report["fits"] is True
    assert (report["num_blocks"], report["adapted_modules"], report["other_entries"]) == (4, 14, [])
    assert inspect(tmp_path / "adapter.chkpt", model=tiny_model("gpt2"))["fits"] is False


def test_patch(outputs: Folder, tmp_path: Path) -> None:
    base = Path(shutil.copytree(outputs("int4"), tmp_path / "base"))
    (base / "config.json").write_text("{}")
    patch.create(base, outputs("int4"), tmp_path / "update.patch")
    report = inspect(tmp_path / "update.patch")
    assert report["kind"] == "patch" and report["adapters"] == ["adapter"]
    changed = {file["name"]: file for file in report["files"] if file["changed_bytes"]}
    assert changed.keys() == {"config.json"} and changed["config.json"]["before"] == 2


def test_what_it_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing that is known here"):
        inspect(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"notes\.txt: is a file; give"):
        inspect(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="no such model folder"):
        inspect(tmp_path / "absent")


def test_needs_no_torch(outputs: Folder, tiny_model: Folder, tiny_adapter: Folder) -> None:
    code = (
        "import sys\nfrom diablo_export import inspect\nfor path in sys.argv[1:]: inspect(path)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'"
    )
    places = [outputs("branch"), outputs("hf"), tiny_model("llama"), tiny_adapter("llama")]
    done = subprocess.run([sys.executable, "-c", code, *map(str, places)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["int4", "hf", "branch"])
def test_reports_are_json(name: str, outputs: Folder) -> None:
    report = inspect(outputs(name))
    assert json.loads(json.dumps(report)) == report
    assert not any(isinstance(value, np.generic) for value in report.values())
