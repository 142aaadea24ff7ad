"""The adapter folder: what is written is read back, and every fault is found and listed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from diablo_export.adapter import CONFIG, WEIGHTS, Adapter, head_classes, ordered_classes, stored_transposed
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import AdapterError
from tests import tiny

Q = "model.layers.0.self_attn.q_proj"
Q_TENSOR = f"base_model.model.{Q}.diablo_blocks"


@pytest.fixture
def folder(tiny_adapter: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama's adapter that a test may break."""
    return Path(shutil.copytree(tiny_adapter("llama"), tmp_path / "adapter"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    tensors = {**safetensors.numpy.load_file(folder / WEIGHTS), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    safetensors.numpy.save_file(kept, folder / WEIGHTS)


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folder)
    (tmp_path / "again").mkdir()
    adapter.save(tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_names_and_shapes_are_pefts(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    assert tensors[Q_TENSOR].shape == (4, 16, 16)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["task_type"], config["format_version"]) == ("DIABLO", "CAUSAL_LM", 1)
    entry = config["modules"]["model.layers.1.mlp.up_proj"]
    assert (entry["in_features"], entry["out_features"], entry["block_size_out"]) == (64, 96, 24)


def test_classifier_head_is_stored_whole(tiny_adapter: Callable[[str], Path]) -> None:
    adapter = Adapter.load(tiny_adapter("bert"))
    assert (adapter.task_type, adapter.modules_to_save, adapter.labels) == (
        "SEQ_CLS",
        ["classifier"],
        ["negative", "positive"],
    )
    assert adapter.saved["classifier.weight"].shape == (2, 64)
    assert adapter.parameters == sum(m.blocks.size for m in adapter.modules.values()) + 130


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "phi3"])
def test_the_right_base_is_accepted(
    architecture: str, tiny_model: Callable[[str], Path], tiny_adapter: Callable[[str], Path]
) -> None:
    Adapter.load(tiny_adapter(architecture)).check_base(Checkpoint.open(tiny_model(architecture)))


def test_a_base_with_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny.make_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"14 of 14 modules do not fit(.|\n)*other values than the one this adapter"):
        Adapter.load(folder).check_base(Checkpoint.open(other))


def test_a_base_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny.make_model("llama", tmp_path / "other", intermediate_size=128)
    with pytest.raises(AdapterError, match=r"up_proj: the model's weight is \[128, 64\], the adapter's is \[96, 64\]"):
        Adapter.load(folder).check_base(Checkpoint.open(other))


def test_a_base_without_the_modules_is_refused(folder: Path, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(AdapterError, match=rf"{Q}: the model has no such weight"):
        Adapter.load(folder).check_base(Checkpoint.open(tiny_model("gpt2")))


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such adapter folder"):
        Adapter.load(tmp_path / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}: missing"):
        Adapter.load(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match=rf"{CONFIG}: missing; .* is not an adapter folder"):
        Adapter.load(folder)


def test_other_kinds_of_adapter(folder: Path) -> None:
    edit_config(folder, peft_type="LORA")
    with pytest.raises(AdapterError, match="peft_type is 'LORA'; only DIABLO"):
        Adapter.load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("modules", [1]), ("modules", "x"), ("num_blocks", "four"), ("target_modules", 3), ("labels", [0, 1]),
     ("modules_to_save", "classifier"), ("base_model_name_or_path", 5)],
)  # fmt: skip
def test_fields_of_another_kind(folder: Path, field: str, value: object) -> None:
    edit_config(folder, **{field: value})
    with pytest.raises(AdapterError, match=re.escape(f"{CONFIG}: {field} is {json.dumps(value)}; it must be ")):
        Adapter.load(folder)


def test_one_target_as_peft_writes_it(folder: Path) -> None:
    edit_config(folder, target_modules="all-linear")
    assert Adapter.load(folder).target_modules == ["all-linear"]


def test_blocks_that_are_no_floats(folder: Path) -> None:
    edit_tensors(folder, **{Q_TENSOR: np.ones((4, 16, 16), np.int32)})
    with pytest.raises(AdapterError, match=rf"{Q}\.diablo_blocks: holds int32; it must be one of F32, F16, BF16, F64"):
        Adapter.load(folder)


def test_newer_format(folder: Path) -> None:
    edit_config(folder, format_version=2)
    with pytest.raises(AdapterError, match="format_version is 2, this program reads 1"):
        Adapter.load(folder)


def test_truncated_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cut short"):
        Adapter.load(folder)


def test_not_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        Adapter.load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(folder: Path, value: float) -> None:
    blocks = np.zeros((4, 16, 16), np.float32)
    blocks[1, 2, 3] = value
    edit_tensors(folder, **{Q_TENSOR: blocks})
    with pytest.raises(AdapterError, match=rf"{Q}\.diablo_blocks: holds NaN or inf"):
        Adapter.load(folder)


def test_all_mismatches_are_listed_at_once(folder: Path) -> None:
    up = "base_model.model.model.layers.0.mlp.up_proj.diablo_blocks"
    extra = "base_model.model.model.layers.9.mlp.up_proj.diablo_blocks"
    edit_tensors(folder, **{Q_TENSOR: None, up: np.zeros((4, 8, 24), np.float32), extra: np.zeros((1, 1, 1), "f4")})
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder)
    message = str(caught.value)
    assert f"{Q}: listed in {CONFIG}, but {WEIGHTS} has no blocks for it" in message
    assert "model.layers.0.mlp.up_proj: blocks of shape (4, 8, 24) cover 4 × 8 = 32 positions" in message
    assert f"model.layers.9.mlp.up_proj: has blocks, but {CONFIG} does not list it" in message


def test_config_and_tensor_disagree(folder: Path) -> None:
    edit_tensors(folder, **{Q_TENSOR: np.zeros((2, 32, 32), np.float32)})
    with pytest.raises(AdapterError, match=r"says blocks of shape \(4, 16, 16\), .* holds \(2, 32, 32\)"):
        Adapter.load(folder)


def test_foreign_tensor_names(folder: Path) -> None:
    edit_tensors(folder, **{"model.embed_tokens.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(AdapterError, match=r"must be named base_model\.model\.…, found model\.embed_tokens\.weight"):
        Adapter.load(folder)


def test_saved_modules_must_be_listed(folder: Path) -> None:
    edit_tensors(folder, **{"base_model.model.classifier.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(AdapterError, match="classifier: stored, but not under modules_to_save"):
        Adapter.load(folder)
    edit_tensors(folder, **{"base_model.model.classifier.weight": None})
    edit_config(folder, modules_to_save=["score"])
    with pytest.raises(AdapterError, match=rf"score: under modules_to_save, but {WEIGHTS} does not hold it"):
        Adapter.load(folder)


def test_empty_adapter(folder: Path) -> None:
    edit_config(folder, modules={})
    safetensors.numpy.save_file({}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="no blocks at all"):
        Adapter.load(folder)


@pytest.mark.parametrize(
    "layers",
    [
        {"classifier.dense": (64, 64), "classifier.out_proj": (3, 64)},  # RoBERTa
        {"classifier": (3, 64), "pre_classifier": (64, 64)},  # DistilBERT, in the order of PEFT's file
        {"bert.pooler.dense": (64, 64), "classifier": (3, 64)},
        {"score": (3, 64)},
    ],
)
def test_classes_are_the_outputs_of_the_head_s_last_layer(layers: dict[str, tuple[int, int]]) -> None:
    saved = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in layers.items()}
    assert head_classes(saved | {"head.norm.weight": np.ones(64, np.float32)}) == 3
    assert head_classes({}) == 0


def test_classes_are_in_the_order_of_their_numbers() -> None:
    assert ordered_classes({"10": "ten", "2": "two", "0": "no"}) == ["no", "two", "ten"]
    assert ordered_classes(None) == ordered_classes({}) == []


def test_gpt2_stores_all_but_its_head_transposed() -> None:
    for module, transposed in (("transformer.h.0.attn.c_attn", True), ("lm_head", False), ("", True)):
        assert stored_transposed({"model_type": "gpt2"}, module) is transposed
        assert not stored_transposed({"model_type": "llama"}, module)
