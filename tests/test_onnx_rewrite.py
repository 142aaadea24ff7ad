"""Merging into a copy of an ONNX model, in one pass over its data."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from diablo_export.adapter import AdaptedModule, Adapter, file_sha256
from diablo_export.blockdiag import add_to_weight
from diablo_export.converters import direct_write, onnx_rewrite
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_file import find
from diablo_export.converters.onnx_linears import linears, numpy_of
from diablo_export.converters.onnx_merge import onnx_merge
from diablo_export.converters.onnx_rewrite import merged_copy, rewrite
from diablo_export.errors import ExportError, InputError, OutputError
from diablo_export.manifest import file_xxh3
from tests.test_onnx_producers import IN, OUT, PRODUCERS, float_model, module, save

Get = Callable[..., Path]


def same_in_place(source: Path, adapter: Adapter, copied: Path, place: Path) -> None:
    """The copy's bytes are those of a merge in place, and the source was not written to."""
    before = {path.name: path.read_bytes() for path in source.parent.iterdir()}
    shutil.copytree(source.parent, place)
    wanted = onnx_merge(place / source.name, adapter)
    copied.mkdir()
    model = find(source)
    assert model is not None
    entries, read, written = merged_copy(model, copied, adapter)
    assert entries == wanted
    assert {path.name: path.read_bytes() for path in source.parent.iterdir()} == before
    (data,) = (path.name for path in model.files[1:])
    assert (copied / data).read_bytes() == (place / data).read_bytes() != (source.parent / data).read_bytes()
    assert (copied / "model.onnx").read_bytes() == source.read_bytes(), "all weights are in the data"
    assert read == {path.name: file_xxh3(path) for path in model.files}
    assert written == {data: file_sha256(copied / data)}


@pytest.mark.parametrize("chunk", [1 << 20, 7])
@pytest.mark.parametrize(
    "producer", ["default-4-asym-32", "default-8-sym-32", "hqq-2-float-zeros", "qdq-uint4", "qdq-int4-matmul", "float"]
)
def test_the_bytes_of_a_merge_in_place(
    producer: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_rewrite, "CHUNK", chunk)
    (tmp_path / "given").mkdir()
    save(float_model() if producer == "float" else PRODUCERS[producer](), tmp_path / "given/model.onnx")
    adapter = Adapter({"m.a": module(5)})  # blocks that end inside groups
    same_in_place(tmp_path / "given/model.onnx", adapter, tmp_path / "copied", tmp_path / "place")


@pytest.mark.parametrize("how", [os.symlink, os.link])
def test_data_behind_links(how: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """As a hub's cache holds a model, and a backup that takes no room."""
    for folder in ("blobs", "given", "place"):
        (tmp_path / folder).mkdir()
    save(PRODUCERS["default-4-asym-32"](), tmp_path / "blobs/model.onnx")
    for path in list((tmp_path / "blobs").iterdir()):
        how(path, tmp_path / "given" / path.name)
        shutil.copy(path, tmp_path / "place")
    adapter, given = Adapter({"m.a": module(4)}), find(tmp_path / "given")
    assert given is not None
    (tmp_path / "copied").mkdir()
    merged_copy(given, tmp_path / "copied", adapter)
    onnx_merge(tmp_path / "place/model.onnx", adapter)
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copied").iterdir()}
    assert copied["model.onnx.data"] == (tmp_path / "place/model.onnx.data").read_bytes()
    assert copied["model.onnx"] == (tmp_path / "blobs/model.onnx").read_bytes()
    for path in (tmp_path / "copied").iterdir():
        assert not path.is_symlink() and path.stat().st_nlink == 1, "the copy stands alone"


@pytest.mark.parametrize("place", ["../blobs/model.onnx.data", "{}/blobs/model.onnx.data"])
def test_data_outside_of_the_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "given").mkdir()
    save(PRODUCERS["default-4-asym-32"](), tmp_path / "blobs/model.onnx")
    graph = onnx.load(tmp_path / "blobs/model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place.format(tmp_path) if entry.key == "location" else entry.value
    onnx.save(graph, tmp_path / "given/model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx: has weights in .*, outside of its own folder"):
        find(tmp_path / "given")


def test_a_file_without_a_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()  # no bytes are a model of protobuf's, with nothing in it
    with pytest.raises(InputError, match=r"model\.onnx: holds a graph without nodes"):
        find(tmp_path)


def test_fused_weights(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """q, k and v in one node: three modules change the bytes of one initializer."""
    adapter = Adapter.load(tiny_adapter("llama"))
    same_in_place(genai_graph("llama", "int4"), adapter, tmp_path / "copied", tmp_path / "place")


@pytest.mark.parametrize("order", [("weight", "scales", "zeros"), ("scales", "zeros", "weight")])
def test_parts_of_a_weight_in_any_place(order: tuple[str, ...], tmp_path: Path) -> None:
    """Scales before their codes, with other bytes between and behind them."""
    (tmp_path / "given").mkdir()
    save(PRODUCERS["default-4-asym-32"](), tmp_path / "given/model.onnx")
    graph = ir.load(tmp_path / "given/model.onnx")
    one = next(layer for layer in linears(graph) if layer.name.startswith("/m/a/"))
    parts = dict(zip(("weight", "scales", "zeros"), one.stored, strict=True))
    old, new = (tmp_path / "given/model.onnx.data").read_bytes(), bytearray()
    for value in [parts[name] for name in order] + [
        v for v in graph.graph.initializers.values() if v not in one.stored
    ]:
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None and tensor.length is not None
        new += b"between"
        start = len(new)
        new += old[tensor.offset : tensor.offset + tensor.length]
        value.const_value = ir.ExternalTensor(
            tensor.location, start, tensor.length, tensor.dtype, shape=tensor.shape, name=str(value.name),
            base_dir=tmp_path / "given",
        )  # fmt: skip
    (tmp_path / "given/model.onnx.data").write_bytes(new + b"behind")
    ir.save(graph, tmp_path / "given/model.onnx")
    same_in_place(tmp_path / "given/model.onnx", Adapter({"m.a": module(4)}), tmp_path / "copied", tmp_path / "place")


def test_a_graph_that_holds_its_weights(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    onnx.save(PRODUCERS["default-4-sym-16"](), tmp_path / "given/model.onnx")
    shutil.copytree(tmp_path / "given", tmp_path / "place")
    adapter = Adapter({"m.a": module(4)})
    onnx_merge(tmp_path / "place/model.onnx", adapter)
    (tmp_path / "copied").mkdir()
    model = find(tmp_path / "given/model.onnx")
    assert model is not None
    _, read, written = merged_copy(model, tmp_path / "copied", adapter)
    merged = (tmp_path / "copied/model.onnx").read_bytes()
    assert merged == (tmp_path / "place/model.onnx").read_bytes() != model.file.read_bytes()
    assert read == {"model.onnx": file_xxh3(model.file)} and written == {}


def test_the_manifest_has_the_hashes_of_what_passed(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    given = genai_graph("llama", "int4")
    manifest = merge(given.parent, tiny_adapter("llama"), tmp_path / "out", method="rtn")
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == file_sha256(tmp_path / "out" / name)
    for name, digest in manifest["base"]["files"].items():
        assert digest == file_xxh3(given.parent / name)


def test_a_tokenizers_folder_of_templates_comes_along(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    shutil.copytree(genai_graph("llama", "int4").parent, tmp_path / "given")
    template = Path("additional_chat_templates/tool_use.jinja")
    (tmp_path / "given" / template.parent).mkdir()
    (tmp_path / "given" / template).write_text("{{ tools }}")
    manifest = merge(tmp_path / "given", tiny_adapter("llama"), tmp_path / "out", method="rtn")
    assert (tmp_path / "out" / template).read_text() == "{{ tools }}" and template.as_posix() in manifest["files"]


def test_a_disk_that_fills_up(
    genai_graph: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, view: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_write, "_write_all", full)
    with pytest.raises(OutputError, match="the disk is full"):
        merge(genai_graph("llama", "int4").parent, tiny_adapter("llama"), tmp_path / "out", method="rtn")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("adapted", [("m.a", "m.other"), ("m.a",)])
def test_weights_with_bytes_in_common_are_refused(adapted: tuple[str, ...], tmp_path: Path) -> None:
    """Two nodes with initializers of their own, which the file stores once."""
    file = tmp_path / "model.onnx"
    save(PRODUCERS["default-4-sym-64"](), file)
    graph = ir.load(file)
    one, other = linears(graph)
    for kept, value in zip(one.stored, other.stored, strict=True):
        tensor = kept.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(value.name),
            base_dir=tmp_path,
        )  # fmt: skip
    ir.save(graph, file)
    blocks = module(4).blocks
    adapter = Adapter({name: AdaptedModule(name, blocks, IN, OUT) for name in adapted})
    model = find(file)
    assert model is not None
    (tmp_path / "copied").mkdir()
    why = r"/m/a/\S+: its weight has bytes in common with m\.other\S+, which would change as well"
    with pytest.raises(ExportError, match=why):
        merged_copy(model, tmp_path / "copied", adapter)
    with pytest.raises(ExportError, match=why):
        onnx_merge(file, adapter)


def test_other_bytes_in_some_places(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)
    (tmp_path / "old").write_bytes(content.tobytes())
    asked = []

    def put(start: int, count: int) -> Callable[[], np.ndarray]:
        def give() -> np.ndarray:
            asked.append(start)
            return np.full(count, start % 251, np.uint8)

        return give

    sizes = {2_000_001: 1_100_000, 0: 5, 5: 1, 999: 0}
    digests = rewrite(tmp_path / "old", tmp_path / "new", {start: put(start, size) for start, size in sizes.items()})
    assert asked == sorted(sizes)
    wanted = content.copy()
    for start, size in sizes.items():
        wanted[start : start + size] = start % 251
    assert (tmp_path / "new").read_bytes() == wanted.tobytes()
    assert digests == (file_xxh3(tmp_path / "old"), hashlib.sha256(wanted.tobytes()).hexdigest())
    with pytest.raises(ExportError, match="overlap at byte 7"):
        rewrite(tmp_path / "old", tmp_path / "new", {0: put(0, 8), 7: put(7, 1)})
    with pytest.raises(InputError, match="became shorter while it was read"):
        rewrite(tmp_path / "old", tmp_path / "new", {content.size - 3: put(0, 8)})


@pytest.mark.parametrize("loads", [True, False])
def test_a_graph_that_onnxruntime_does_not_load_here(
    loads: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For other hardware, such as MatMul in bfloat16, it is merged; what the merge broke is named by what was given."""
    (tmp_path / "given").mkdir()
    given = tmp_path / "given/model.onnx"
    model = float_model()
    if loads:
        saved = ir.save

        def broken(graph: ir.Model, file: Path) -> None:
            graph.graph.append(ir.Node("of", "Unheard", [graph.graph.inputs[0]]))
            saved(graph, file)

        monkeypatch.setattr(ir, "save", broken)
    else:
        model.graph.node.append(helper.make_node("Unheard", ["x"], ["y"], domain="of"))
        model.opset_import.append(helper.make_opsetid("of", 1))
    onnx.save(model, given)
    (tmp_path / "adapter").mkdir()
    Adapter({"m.a": module(4)}, num_blocks=4, target_modules=["a"]).save(tmp_path / "adapter")
    if loads:
        with pytest.raises(ExportError, match=r"given/model\.onnx: with the blocks in it, onnxruntime .*Unheard"):
            merge(given, tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    with caplog.at_level("WARNING", "diablo_export"):
        merge(given, tmp_path / "adapter", tmp_path / "out")
    assert "given/model.onnx: onnxruntime" in caplog.text and "not tried" in caplog.text
    before, after = (
        {layer.name: layer for layer in linears(ir.load(file))} for file in (given, tmp_path / "out/model.onnx")
    )
    name = "/m/a/MatMul"
    wanted = add_to_weight(np.array(numpy_of(before[name].weight)).T, module(4).blocks)
    assert np.array_equal(numpy_of(after[name].weight).T, wanted)
