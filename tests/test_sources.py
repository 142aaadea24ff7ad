from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diablo_export.errors import InputError
from diablo_export.measure import sources


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return {"adapters": [{"name": name, "path": str(tmp_path / name), "sha256": {}} for name in ("a", "b")]}


def test_all_adapters_by_default_and_some_by_name(manifest: dict[str, Any], tmp_path: Path) -> None:
    assert list(sources.adapter_folders(manifest, [])) == ["a", "b"]
    assert sources.adapter_folders(manifest, ["b"]) == {"b": tmp_path / "b"}
    assert sources.adapter_folders(manifest, [f"b={tmp_path / 'a'}"]) == {"b": tmp_path / "a"}


def test_a_path_alone_stands_for_the_only_adapter(manifest: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"this folder has the adapters a, b; give NAME, or NAME=PATH"):
        sources.adapter_folders(manifest, [str(tmp_path / "b")])
    del manifest["adapters"][1]
    assert sources.adapter_folders(manifest, [str(tmp_path / "b")]) == {"a": tmp_path / "b"}


def test_hashes_tell_changed_missing_and_new_files(tmp_path: Path) -> None:
    out, base = tmp_path / "out", tmp_path / "base"
    for folder in (out / "adapters", base):
        folder.mkdir(parents=True)
    (out / "same").write_text("")
    (out / "adapters" / "changed").write_text("x")
    (out / "new").write_text("")
    (out / "parity.json").write_text("not hashed: it is written later")
    (base / "model.safetensors").write_text("y")
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes
    files = {name: {"sha256": nothing} for name in ("same", "adapters/changed", "gone")}
    manifest = {"files": files, "base": {"path": str(base), "files": {"model.safetensors": "0" * 32}}}
    found = sources.hashes(out, manifest, base, {})
    assert found["files"]["same"] == nothing
    assert found["changed"] == ["adapters/changed", "gone", "new"]
    assert found["sources_changed"] == ["base:model.safetensors"]


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ({"quantize": "int4"}, "int4"),
        ({"quantize": "none", "precision": "fp16"}, "fp16"),
        ({"options": {"quantize": "int8"}}, "int8"),
        ({}, "fp32"),
    ],
)
def test_precision_of_onnx(manifest: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    assert sources.precision(tmp_path, manifest) == expected


def test_what_blocks_are_stored_in() -> None:
    assert sources.block_dtype({"options": {"block_dtype": "int8"}}) == "int8"
    assert sources.block_dtype({"options": {"block_dtype": None}}) is sources.block_dtype({}) is None


def test_precision_of_a_checkpoint_is_that_of_its_merged_weights(tmp_path: Path) -> None:
    import ml_dtypes
    import numpy as np

    from diablo_export.checkpoint import write_safetensors

    (tmp_path / "config.json").write_text(json.dumps({}))
    value = np.zeros((2, 2), ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": ("BF16", (2, 2))}, [("a.weight", value)])
    assert sources.precision(tmp_path, {"modules": [{"name": "a"}]}) == "bf16"
    assert sources.precision(tmp_path, {"modules": []}) == "fp32"
