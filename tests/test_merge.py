from __future__ import annotations

import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diablo_export.adapter import AdaptedModule, Adapter, file_sha256
from diablo_export.blockdiag import add_to_weight
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.errors import AdapterError, CheckpointError, ExportError, InputError, OutputError
from diablo_export.fingerprint import fingerprint
from diablo_export.manifest import file_xxh3, read_manifest
from tests import tiny
from tests.onnx_runs import LOGITS, in_torch, runner

Get = Callable[..., Path]


def test_hugging_face_by_default(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    manifest = merge(tiny_model("llama"), tiny_adapter("llama"), out)
    np.testing.assert_allclose(in_torch(out), in_torch(tiny_model("llama"), tiny_adapter("llama")), rtol=0, atol=LOGITS)
    adapter, base, merged = (
        Adapter.load(tiny_adapter("llama")),
        Checkpoint.open(tiny_model("llama")),
        Checkpoint.open(out),
    )
    for name, info in base.tensors.items():
        module = adapter.modules.get(name.removesuffix(".weight"))
        before = info.read()
        wanted = before if module is None else add_to_weight(before, module.blocks)
        assert np.array_equal(merged.tensors[name].read(), wanted)
    assert (manifest["format"], manifest["exporter"], manifest["task"]) == ("hf", "hf", "causal-lm")
    assert manifest == read_manifest(out)


def test_manifest(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    manifest = merge(
        tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", quantize="int4", group_size=16, method="rtn"
    )
    assert (manifest["command"], manifest["format"], manifest["quantize"], manifest["exporter"]) == (
        "merge", "onnx", "int4", "genai",
    )  # fmt: skip
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == file_sha256(tmp_path / "out" / name)
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= manifest["files"].keys()
    weights = tiny_model("llama") / "model.safetensors"
    assert manifest["base"]["files"] == {"model.safetensors": file_xxh3(weights)}
    assert manifest["adapters"][0]["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    modules = {module["name"]: module for module in manifest["modules"]}
    assert modules.keys() == Adapter.load(tiny_adapter("llama")).modules.keys()
    for module in modules.values():
        assert (module["action"], module["bits"], module["group_size"]) == ("merged", 4, 16)
        assert module["why"] == "added to the weight, the sum then rounded to int4"


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "phi3"])
def test_onnx_float_is_the_tuned_model(architecture: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    manifest = merge(tiny_model(architecture), tiny_adapter(architecture), tmp_path / "out", format="onnx")
    wanted = in_torch(tiny_model(architecture), tiny_adapter(architecture))
    np.testing.assert_allclose(runner(tmp_path / "out/model.onnx")(), wanted, rtol=0, atol=LOGITS)
    assert len(manifest["modules"]) == len(Adapter.load(tiny_adapter(architecture)).modules)


def test_merge_and_branch_agree(tiny_model: Get, tiny_adapter: Get, exported: Get, tmp_path: Path) -> None:
    merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", format="onnx")
    branch = runner(exported("llama") / "model.onnx")(exported("llama") / "adapters/a.onnx_adapter")
    np.testing.assert_allclose(runner(tmp_path / "out/model.onnx")(), branch, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_output_head_that_the_base_ties(stored: str, tiny_model: Get, tmp_path: Path) -> None:
    """Merged in float, merged into ONNX and exported as a branch: the head alone changes, not the embeddings."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model("llama-tied"), base)
    tensors = load_file(base / "model.safetensors")
    embeddings = tensors.pop("model.embed_tokens.weight")  # (320, 64)
    save_file(tensors | {stored: embeddings}, base / "model.safetensors", {"format": "pt"})
    blocks = np.random.default_rng(0).normal(0, 0.1, (4, 16, 80)).astype(np.float32)
    adapter.mkdir()
    Adapter({"lm_head": AdaptedModule("lm_head", blocks, 64, 320, fingerprint(embeddings))}).save(adapter)
    merge(base, adapter, tmp_path / "hf")
    wanted = in_torch(tmp_path / "hf")
    assert np.abs(wanted - in_torch(base)).max() > 0.1
    np.testing.assert_allclose(in_torch(base, adapter), wanted, rtol=0, atol=LOGITS)
    merge(base, adapter, tmp_path / "onnx", format="onnx")
    np.testing.assert_allclose(runner(tmp_path / "onnx/model.onnx")(), wanted, rtol=0, atol=LOGITS)
    export(base, {"a": adapter}, tmp_path / "branch")
    run = runner(tmp_path / "branch/model.onnx")
    np.testing.assert_allclose(run(), in_torch(base), rtol=0, atol=LOGITS)
    np.testing.assert_allclose(run(tmp_path / "branch/adapters/a.onnx_adapter"), wanted, rtol=0, atol=LOGITS)


@pytest.mark.slow
def test_a_classifier_with_its_head(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    merge(tiny_model("bert"), tiny_adapter("bert"), tmp_path / "out", format="onnx")
    wanted = in_torch(tiny_model("bert"), tiny_adapter("bert"))
    np.testing.assert_allclose(runner(tmp_path / "out/model.onnx")(), wanted, rtol=0, atol=LOGITS)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4", "format": "hf"}, "--quantize int4 needs --format onnx, and --format hf needs"),
        ({"format": "gguf"}, "format is 'gguf'; choose one of onnx, hf"),
        ({"precision": "fp16"}, "--precision is for --format onnx"),
        ({"quantize": "int5"}, "quantize is 'int5'; choose one of none, int8, int4"),
        ({"quantize": "int4", "group_size": 100}, "groups of 100"),
        ({"quantize": "int4", "method": "awq"}, "method is 'awq'; choose one of auto, rtn, refit, calibrated, dist"),
        ({"quantize": "int4", "min_survival": 1.5}, "min_survival is 1.5; it must be between 0 and 1"),
        ({"quantize": "int4", "max_seconds": 0}, "max_seconds is 0; it must be above 0"),
        ({"quantize": "int4", "method": "rtn", "calibration": "x"}, "--calibration is not looked at by --method rtn"),
        ({"quantize": "int8", "method": "hqq"}, "onnxruntime takes at 4 and 2 bits and not at int8; choose k_quant"),
        ({"quantize": "int4", "seed": -1}, "seed is -1; it must be at least 0 and below"),
        ({"quantize": "int4", "seed": 2**70}, "seed is 1180591620717411303424; it must be at least 0 and below"),
        ({"group_size": 32}, "--group-size: for the weights that --quantize rounds, and that is none"),
        ({"group_size": 32, "asymmetric": False}, "--group-size, --asymmetric or --symmetric: for the weights"),
        ({"method": "auto"}, "--method and --calibration are for quantized weights, and --quantize none"),
        ({"quantize": "int4", "reference": "x"}, "--reference is for an ONNX --model"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, Any], message: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "onnx"])
def test_another_base(format: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"does not belong to the model[\s\S]*has other values"):
        merge(tiny_model("llama-tied"), tiny_adapter("qwen2"), tmp_path / "out", format=format)
    with pytest.raises(AdapterError, match=r"the model's weight is \[64, 96\], the adapter's is \[64, 128\]"):
        wide = tiny.make_model("llama", tmp_path / "wide", intermediate_size=128)
        merge(tiny_model("llama"), tiny.make_adapter(wide, tmp_path / "wide-adapter"), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"quantize": "int4"}, {"precision": "fp16", "format": "onnx"}, {"format": "hf"}])
def test_an_onnx_model_is_not_converted(
    options: dict[str, Any], genai_graph: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"model\.onnx: is ONNX already and keeps its weights' types"):
        merge(genai_graph("llama", "int4").parent, tiny_adapter("llama"), tmp_path / "out", **options)


def test_modules_that_the_graph_loses(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diablo_export.converters import onnx_graph

    build = onnx_graph.build_graph

    def lossy(*arguments: Any, **options: Any) -> onnx_graph.Graph:
        built = build(*arguments, **options)
        kept = {name: entry for name, entry in built.modules.items() if "layers.1.mlp.up" not in name}
        return dataclasses.replace(built, modules=kept)

    monkeypatch.setattr(onnx_graph, "build_graph", lossy)
    with pytest.raises(ExportError, match=r"no node for 1 adapted modules.*layers\.1\.mlp\.up_proj.*--format hf"):
        merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", quantize="int4")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "onnx"])
def test_truncated_weights(format: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short"):
        merge(model, tiny_adapter("llama"), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["hf", "onnx"])
def test_no_room(
    format: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"will be written, 0\.001 MB are free"):
        merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", format=format)


def test_a_disk_that_fills_up(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diablo_export.converters.hf_merge.write_index", full)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(OutputError, match=r"the disk is full .* nothing was left behind"):
        merge(tiny_model("llama"), tiny_adapter("llama"), out, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old.txt"]


def test_a_really_full_disk(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("a small file system can be mounted by root only")
    try:
        plenty = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)  # the estimate must not save it
        for quantize in ("none", "int8"):
            with pytest.raises(OutputError, match="the disk is full"):
                merge(tiny_model("llama"), tiny_adapter("llama"), disk / "out", quantize=quantize)
            assert not any(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not writable"):
            merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("verb", [merge, export])
def test_asymmetric_groups_have_zero_points(verb: Any, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    how = {"quantize": "int4"} | ({"method": "rtn"} if verb is merge else {})
    plain = verb(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "plain", **how)
    nearer = verb(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", asymmetric=True, **how)
    assert {module["symmetric"] for module in plain["modules"]} == {True}
    assert all(not module["symmetric"] and module["zero_points"] for module in nearer["modules"])
    assert (nearer["options"]["asymmetric"], plain["options"]["asymmetric"]) == (True, False)


# ------------------------------------------------------------------------------------------------- killed, any time

_VICTIM = """
import sys
from diablo_export.converters.{verb} import {verb}
print("ready", flush=True)
{verb}(*sys.argv[1:4], overwrite=True, **{options})
print("done", flush=True)
"""


def victim(verb: str, options: dict[str, Any], *arguments: Path) -> subprocess.Popen[str]:
    code = _VICTIM.format(verb=verb, options=options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def state(out: Path) -> str:
    """Old or new: everything that is there must be whole."""
    if (out / "old.txt").exists():
        assert [path.name for path in out.iterdir()] == ["old.txt"]
        return "old"
    for name, entry in read_manifest(out)["files"].items():
        assert file_sha256(out / name) == entry["sha256"]
    return "new"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("merge", {}),
        ("merge", {"quantize": "int4", "method": "rtn"}),
        ("merge", {"quantize": "int4", "method": "calibrated", "min_survival": 0.5}),
        ("export", {"quantize": "int4"}),
    ],
)
def test_killed_at_any_moment(
    verb: str, options: dict[str, Any], how: signal.Signals, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    """The folder is the old one or the new one whole; a kill that can be caught leaves nothing beside it."""
    random.seed(verb + str(how))
    out = tmp_path / "out"
    seen = set()
    longest = 1.5
    for _ in range(4):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "old.txt").write_text("old")
        process = victim(verb, options, tiny_model("llama"), tiny_adapter("llama"), out)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        started = time.monotonic()
        try:
            process.wait(random.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(how)
        finished = process.communicate()[0] == "done\n"
        longest = min(longest, 1.2 * (time.monotonic() - started)) if finished else longest
        seen.add(state(out))
        assert not finished or state(out) == "new"
        if how is signal.SIGINT:
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (merge if verb == "merge" else export)(
        tiny_model("llama"), tiny_adapter("llama"), out, overwrite=True, **options
    )  # what the dead left behind is cleared away, and does not stand in the way
    assert state(out) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", [merge, export])
def test_an_adapter_of_zeros_is_warned_of(
    verb: Any, tiny_model: Get, tiny_adapter: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = shutil.copytree(tiny_adapter("llama"), tmp_path / "zeros")
    verb(tiny_model("llama"), adapter, tmp_path / "sound")
    assert "every block is zero" not in caplog.text
    blocks = {name: value * 0 for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(blocks, adapter / "adapter_model.safetensors")
    verb(tiny_model("llama"), adapter, tmp_path / "out")
    assert f"the adapter {adapter}: every block is zero, so that it changes nothing" in caplog.text
