"""Blocks stored in fewer bits than the graph computes in: files, numbers, parity, onnxruntime-genai."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.block_storage import MOST_ERROR, from_int8, relative_error, to_int8
from diablo_export.converters.export import export
from diablo_export.errors import ExportError, InputError
from diablo_export.manifest import read_manifest
from diablo_export.measure.onnx_runner import OnnxRunner
from diablo_export.measure.parity import parity
from tests.exports import SMALL
from tests.onnx_runs import IDS, LOGITS, in_torch, runner

Get = Callable[..., Path]
BYTES = {"fp16": 2, "int8": 1}  # of one entry of a block
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function bodies; the kernels have tests of their own."""
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, "off")


def stored(adapter: Path, to: Path, block_dtype: str) -> Path:
    """The adapter whose blocks are what a `block_dtype` holds of this one's: the reference in float32."""
    whole = Adapter.load(adapter)
    narrow: Any = {"fp16": lambda b: b.astype(np.float16).astype(np.float32), "int8": lambda b: from_int8(*to_int8(b))}
    modules = {n: dataclasses.replace(m, blocks=narrow[block_dtype](m.blocks)) for n, m in whole.modules.items()}
    to.mkdir()
    dataclasses.replace(whole, modules=modules).save(to)
    return to


@pytest.mark.parametrize("block_dtype", ["fp16", "int8"])
# whole nodes; parts that are joined; a head
@pytest.mark.parametrize("architecture", ["llama", "phi3", pytest.param("bert", marks=pytest.mark.slow)])
def test_the_graph_answers_as_the_stored_blocks_do(
    architecture: str, block_dtype: str, exported: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    folder = exported(architecture, block_dtype=block_dtype)
    run = runner(folder / "model.onnx")
    reference = in_torch(tiny_model(architecture), stored(tiny_adapter(architecture), tmp_path / "a", block_dtype))
    tuned = run(folder / "adapters/a.onnx_adapter")
    np.testing.assert_allclose(tuned, reference, rtol=0, atol=LOGITS)
    base = runner(exported(architecture) / "model.onnx")()
    assert np.array_equal(run(), base), "unfed it is the same base, bit for bit"
    assert np.abs(tuned - base).max() > 1000 * LOGITS


@pytest.mark.parametrize("block_dtype", ["fp16", "int8"])
def test_a_half_or_a_quarter_of_the_bytes(block_dtype: str, exported: Get) -> None:
    def tensors(folder: Path) -> dict[str, Any]:
        return runtime.load_adapter(folder / "adapters/a.onnx_adapter").values()

    wide, narrow = tensors(exported("llama")), tensors(exported("llama", block_dtype=block_dtype))
    blocks = {name: value for name, value in narrow.items() if name.endswith(".diablo_blocks")}
    scales = {name: value for name, value in narrow.items() if name.endswith(".diablo_scales")}
    assert blocks.keys() == wide.keys() and {value.itemsize for value in blocks.values()} == {BYTES[block_dtype]}
    size = sum(value.nbytes for value in blocks.values())
    assert size * 4 == sum(value.nbytes for value in wide.values()) * BYTES[block_dtype]
    assert len(scales) == (len(blocks) if block_dtype == "int8" else 0)
    assert all(v.shape == blocks[n.replace("scales", "blocks")].shape[:1] for n, v in scales.items())
    # the file adds names and shapes: a few hundred bytes for each tensor
    file = (exported("llama", block_dtype=block_dtype) / "adapters/a.onnx_adapter").stat().st_size
    assert file - size - sum(value.nbytes for value in scales.values()) < 400 * len(narrow)


def test_structure_and_manifest(exported: Get, tiny_adapter: Get) -> None:
    folder = exported("llama", block_dtype="int8")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [function.name for function in proto.functions] == ["BlockDiagMatMulInt8"]
    nodes = [node for node in proto.graph.node if node.op_type == "BlockDiagMatMulInt8"]
    assert [list(node.input[1:3]) for node in nodes if node.name.startswith(Q)] == [
        [f"{Q}.diablo_blocks", f"{Q}.diablo_scales"]
    ]
    kinds = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    assert (kinds[f"{Q}.diablo_blocks"], kinds[f"{Q}.diablo_scales"]) == (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT)
    manifest = read_manifest(folder)
    assert manifest["options"]["block_dtype"] == "int8"
    errors = {module["name"]: module["block_error"] for module in manifest["modules"]}
    blocks = Adapter.load(tiny_adapter("llama")).modules[Q].blocks
    assert errors[Q] == {"a": relative_error(blocks, from_int8(*to_int8(blocks)))}
    assert errors["model.layers.1.self_attn.q_proj"].keys() == {"a", "b"}
    assert all("block_error" not in module for module in read_manifest(exported("llama"))["modules"])


@pytest.mark.parametrize("block_dtype", ["fp16", "int8"])
def test_parity_passes(block_dtype: str, exported: Get) -> None:
    report = parity(exported("llama", block_dtype=block_dtype), **SMALL)
    assert report["verdict"] == "pass", [check for check in report["checks"] if not check["pass"]]
    assert {"adapter.alive@a", "adapter.survival_gain.error@b"} <= {check["name"] for check in report["checks"]}


def test_parity_finds_wrong_scales(exported: Get, tmp_path: Path) -> None:
    """Scales that are a tenth too large: every code is right, every block a tenth too strong."""
    import shutil

    from diablo_export.swap import write_adapter
    from tests.exports import announce, failed

    folder = tmp_path / "wrong"
    shutil.copytree(exported("llama", block_dtype="int8"), folder)
    swap = runtime.load_adapter(folder / "adapters/a.onnx_adapter")
    values = {n: v * np.float32(1.1) if n.endswith("scales") else v for n, v in swap.values().items()}
    write_adapter(folder / "adapters/a.onnx_adapter", values, swap.base)
    report = parity(announce(folder), **SMALL)
    assert "adapter.survival_gain.error@a" in failed(report)
    assert not any(name.endswith("@b") for name in failed(report))


def test_int8_beside_float16(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    export(tiny_model("llama"), {"a": tiny_adapter("llama")}, tmp_path / "out", precision="fp16", block_dtype="int8")
    tuned = runner(tmp_path / "out/model.onnx")(tmp_path / "out/adapters/a.onnx_adapter").astype(np.float32)
    reference = in_torch(tiny_model("llama"), stored(tiny_adapter("llama"), tmp_path / "a", "int8"))
    # weights, blocks and activations rounded to 2^-11 of themselves, logits near 10, two layers
    np.testing.assert_allclose(tuned, reference, rtol=0, atol=0.1)


@pytest.mark.parametrize("block_dtype", ["fp16", "int8"])
def test_genai_swaps_them(block_dtype: str, exported: Get) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    from tests.test_genai_swap import generate

    folder = exported("llama", block_dtype=block_dtype)
    model, run = og.Model(str(folder)), runner(folder / "model.onnx")
    adapters = og.Adapters(model)
    for each in ("a", "b"):
        adapters.load(str(folder / f"adapters/{each}.onnx_adapter"), each)
    order: list[str | None] = ["a", None, "b"]
    for name in order:
        _, logits = generate(model, adapters, name)
        alone = run(folder / f"adapters/{name}.onnx_adapter" if name else None)[0, -1]
        np.testing.assert_array_equal(logits[0], alone)  # the same kernels on the same inputs


def test_web_exports_store_them_too(exported: Get) -> None:
    from safetensors.numpy import load_file

    folder = exported("llama", for_="web", block_dtype="int8")
    fed = load_file(folder / "adapters/a.safetensors")
    assert fed[f"{Q}.diablo_blocks"].dtype == np.int8 and fed[f"{Q}.diablo_scales"].shape == (4,)
    wanted = runner(exported("llama", block_dtype="int8") / "model.onnx")
    run = runner(folder / "model.onnx")
    adapter = exported("llama", block_dtype="int8") / "adapters/a.onnx_adapter"
    np.testing.assert_array_equal(run(more=fed), wanted(adapter))
    np.testing.assert_array_equal(run(more=load_file(folder / "adapters/base.safetensors")), wanted())
    assert parity(folder, adapter="a", **SMALL)["verdict"] == "pass"
    alone = OnnxRunner(runtime.session(folder / "model.onnx", threads=1)).prefill(
        IDS[0]
    )  # given no blocks it is the base
    np.testing.assert_array_equal(alone, wanted()[0])


def test_blocks_that_lose_too_much_are_named(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Adapter.load(tiny_adapter("llama"))
    spiky = np.full_like(whole.modules[Q].blocks, 0.001)
    spiky[:, 0, 0] = 0.2  # one entry sets the scale, 0.2 / 127: the others are 0.6 steps
    modules = {**whole.modules, Q: dataclasses.replace(whole.modules[Q], blocks=spiky)}
    (tmp_path / "spiky").mkdir()
    dataclasses.replace(whole, modules=modules).save(tmp_path / "spiky")
    with caplog.at_level(logging.INFO):
        manifest = export(tiny_model("llama"), tmp_path / "spiky", tmp_path / "out", block_dtype="int8")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"adapter spiky: blocks of {Q} are off by more than 0.02 of their size" in warning
    assert any("adapter spiky: stored blocks are off by 0.0" in record.getMessage() for record in caplog.records)
    found = {m["name"]: m["block_error"]["spiky"] for m in manifest["modules"]}
    assert [name for name, error in found.items() if error > MOST_ERROR] == [Q]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_dtype": "int4"}, "block_dtype is 'int4'; choose one of fp32, fp16, int8"),
        ({"block_dtype": "fp32", "precision": "fp16"}, "blocks are at most as wide as the graph"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_an_onnx_model_in_float16(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    from diablo_export.converters.onnx_graph import build_graph

    (tmp_path / "model").mkdir()
    build_graph(tiny_model("llama"), tmp_path / "model", precision="fp16")
    with pytest.raises(ExportError, match=r"blocks in fp32, but the graph computes model\.\S+ in float16"):
        export(tmp_path / "model", tiny_adapter("llama"), tmp_path / "out", block_dtype="fp32")
