"""Reading and writing checkpoints: against the safetensors library, and every way a file can be broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from diablo_export import checkpoint
from diablo_export.checkpoint import Checkpoint, read_header, write_safetensors
from diablo_export.errors import CheckpointError

DTYPES = [name for name in checkpoint.DTYPES if not name.startswith(("F8", "BF"))]


def write(file: Path, tensors: dict[str, np.ndarray], **metadata: str) -> None:
    layout = {name: (checkpoint.DTYPE_NAMES[value.dtype], value.shape) for name, value in tensors.items()}
    write_safetensors(file, layout, tensors.items(), metadata or None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_what_is_written(dtype: str, tmp_path: Path) -> None:
    tensors = {
        "matrix": np.arange(12).reshape(3, 4).astype(checkpoint.DTYPES[dtype]),
        "scalar": np.array(1).astype(checkpoint.DTYPES[dtype]),
        "empty": np.zeros((0, 3), checkpoint.DTYPES[dtype]),
    }
    write(tmp_path / "a.safetensors", tensors, format="pt")
    read = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value)


def test_reading_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {"bf16": torch.randn(5, 7).bfloat16(), "half": torch.randn(3).half(), "flag": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    infos, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    assert infos["bf16"].read().dtype == ml_dtypes.bfloat16
    for name, value in tensors.items():
        np.testing.assert_array_equal(infos[name].read().astype(np.float64), value.double().numpy())


def test_sharded_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = {"model-1.safetensors": "a.weight", "model-2.safetensors": "b.weight"}
    for file, name in shards.items():
        write(tmp_path / file, {name: np.ones((2, 2), np.float32)})
    index = {"weight_map": {name: file for file, name in shards.items()}}
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    opened = Checkpoint.open(tmp_path)
    assert sorted(opened.tensors) == ["a.weight", "b.weight"]
    assert [file.name for file in opened.files] == sorted(shards)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names shards that are not there: model-2\.safetensors"):
        Checkpoint.open(tmp_path)


def test_names_are_found_under_another_prefix(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / checkpoint.SINGLE, {"encoder.x.weight": np.ones(2), "bert.pooler.weight": np.zeros(3)})
    opened = Checkpoint.open(tmp_path)
    assert opened.find("bert.encoder.x.weight") is opened.tensors["encoder.x.weight"]
    assert opened.find("pooler.weight") is opened.tensors["bert.pooler.weight"]
    assert opened.find("decoder.x.weight") is None


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_file(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, {"w": np.ones((8, 8), np.float32)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .*cut short"):
        read_header(file)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, {"w": np.ones((8, 8), np.float32)})
    info = read_header(file)[0]["w"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends inside tensor 'w'"):
        info.read()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"not json ", "its header is no JSON"),
        (b'["w"]', "its header, or that's __metadata__, is no JSON object"),
        (b'{"__metadata__": "pt"}', "its header, or that's __metadata__, is no JSON object"),
        (json.dumps({"w": {"dtype": "F32", "shape": [2]}}).encode(), "tensor 'w' has a broken header entry"),
        (json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}).encode(), "takes 36 bytes"),
        (json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}).encode(), "begins at byte -8"),
    ],
)
def test_broken_headers(header: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=said):
        read_header(tmp_path / "a.safetensors")


def test_unknown_dtype(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="dtype F4; readable are F64, F32"):
        read_header(tmp_path / "a.safetensors")[0]["w"].read()


def test_a_dtype_that_is_no_text(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"dtype \['F32'\]; readable are F64"):
        read_header(tmp_path / "a.safetensors")[0]["w"].read()


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a JSON list, not an object"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, which are pickles and are not opened"):
        Checkpoint.open(tmp_path)


def test_an_id_that_cannot_be_had() -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder here, and not to be had"):
        Checkpoint.open("nobody/nothing")


def test_announced_and_given_tensors_must_agree(tmp_path: Path) -> None:
    layout = {"w": ("F32", (2, 2))}
    with pytest.raises(ValueError, match="was announced as w F32"):
        write_safetensors(tmp_path / "a.safetensors", layout, [("w", np.ones((2, 3), np.float32))])


def test_real_checkpoint(tiny_model: Callable[[str], Path]) -> None:
    opened = Checkpoint.open(tiny_model("llama"))
    assert opened.config["model_type"] == "llama"
    wanted = safetensors.numpy.load_file(tiny_model("llama") / checkpoint.SINGLE)
    for info in opened:
        np.testing.assert_array_equal(info.read(), wanted[info.name])


@pytest.mark.parametrize("index", [{}, {"weight_map": 5}, {"weight_map": {"w": 5}}])
def test_an_index_of_another_kind(index: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: its weight_map is no object of tensor names and files"):
        Checkpoint.open(tmp_path)


def test_an_index_that_lists_what_no_shard_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / "one.safetensors", {"a": np.ones(2, np.float32)})
    listed = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"index\.json: lists tensors that no shard holds: b"):
        Checkpoint.open(tmp_path)


def model(folder: Path, **tensors: np.ndarray) -> Checkpoint:
    """A checkpoint of these tensors; __ in their names is a dot."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write(folder / checkpoint.SINGLE, {name.replace("__", "."): value for name, value in tensors.items()})
    return Checkpoint.open(folder)


def test_what_two_tensors_could_be_is_neither(tmp_path: Path) -> None:
    ones = np.ones((2, 2), np.float32)
    two = model(tmp_path / "two", a__x__weight=ones, b__x__weight=ones, a__wte__weight=ones, b__wte__weight=ones)
    assert two.find("x.weight") is None and two.weight_of("lm_head") is None
    one = model(tmp_path / "one", a__x__weight=ones, a__wte__weight=ones)
    assert one.find("x.weight") is one.tensors["a.x.weight"]
    assert one.weight_of("lm_head") is one.tensors["a.wte.weight"]


def test_a_head_of_other_values_than_the_embeddings_is_its_own(tmp_path: Path) -> None:
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert model(tmp_path / "own", wte__weight=table, lm_head__weight=table + 1).has_own_head()
    assert not model(tmp_path / "same", wte__weight=table, lm_head__weight=table).has_own_head()
    assert not model(tmp_path / "none", wte__weight=table).has_own_head()


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_begin_at_multiples_of_eight(length: int) -> None:
    assert len(checkpoint.header_bytes({"n" * length: ("F32", (2,))})) % 8 == 0
