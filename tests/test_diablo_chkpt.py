"""The paper's adapter.chkpt: recovered, checked, refused, and written back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.diablo_chkpt import convert, load_tensors
from diablo_export.errors import AdapterError, InputError, OutputError
from diablo_export.packed.modules import stored

Folder = Callable[[str], Path]
PATHS = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]


def state(**changes: Any) -> dict[str, Any]:
    """What the paper's code saves for tests/tiny.py's Llama with N = 8: q 64→64, v 64→32, up 64→96."""
    torch.manual_seed(0)
    sizes = {"q_proj": (8, 8, 8), "v_proj": (8, 8, 4), "up_proj": (8, 8, 12)}
    blocks = {f"{path}.block_A": torch.randn(sizes[path.rpartition(".")[2]]) for path in PATHS}
    return {**blocks, **changes}


def saved(folder: Path, value: Any, **options: Any) -> Path:
    torch.save(value, folder / "adapter.chkpt", **options)
    return folder / "adapter.chkpt"


def test_recovers_blocks_sizes_and_targets(tiny_model: Folder, tmp_path: Path) -> None:
    blocks = state()
    done = convert(saved(tmp_path, blocks), tiny_model("llama"), tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    assert done.modules == PATHS and done.skipped == []
    assert (adapter.num_blocks, adapter.target_modules) == (8, ["q_proj", "up_proj", "v_proj"])
    assert adapter.base_model == str(tiny_model("llama")) and adapter.task_type == "CAUSAL_LM"
    for path in PATHS:
        module = adapter.modules[path]
        np.testing.assert_array_equal(module.blocks, blocks[f"{path}.block_A"].numpy())
        assert module.in_features == 64 and module.fingerprint is not None
    assert adapter.modules[PATHS[2]].out_features == 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_exact(dtype: torch.dtype, tiny_model: Folder, tmp_path: Path) -> None:
    blocks = {name: value.to(dtype) for name, value in state().items()}
    convert(saved(tmp_path, blocks), tiny_model("llama"), tmp_path / "adapter")
    convert(tmp_path / "adapter", tiny_model("llama"), tmp_path / "again.chkpt")
    again = torch.load(tmp_path / "again.chkpt", weights_only=True)
    assert list(again) == list(blocks)
    for name, value in blocks.items():
        assert again[name].dtype == dtype and torch.equal(again[name], value)
    if dtype == torch.bfloat16:
        assert load_tensors(tmp_path / "again.chkpt")[f"{PATHS[0]}.block_A"].dtype == ml_dtypes.bfloat16


def test_blocks_of_a_quantized_checkpoint_go_round(quantized: Folder, tiny_model: Folder, tmp_path: Path) -> None:
    convert(saved(tmp_path, state()), quantized("awq"), tmp_path / "adapter")
    module = Adapter.load(tmp_path / "adapter").modules[PATHS[2]]
    weight = stored(Checkpoint.open(quantized("awq")), PATHS[2])
    assert (module.in_features, module.out_features) == (64, 96) and module.fingerprint is not None and weight
    assert module.fingerprint.matches(weight.unpacked().values())
    convert(tmp_path / "adapter", quantized("awq"), tmp_path / "again.chkpt")
    again = torch.load(tmp_path / "again.chkpt", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in state().items())
    with pytest.raises(AdapterError, match="6 of 6 modules do not fit"):
        convert(tmp_path / "adapter", tiny_model("llama"), tmp_path / "float.chkpt")


def test_padded_sizes_are_recovered(tiny_model: Folder, tmp_path: Path) -> None:
    """N = 7 on 64 → 96: blocks of 10 × 14, 7 of them, as the paper's layer pads."""
    path = "model.layers.0.mlp.up_proj"
    convert(saved(tmp_path, {f"{path}.block_A": torch.ones(7, 10, 14)}), tiny_model("llama"), tmp_path / "adapter")
    shape = Adapter.load(tmp_path / "adapter").modules[path].shape
    assert (shape.blocks, shape.in_features, shape.out_features) == ((7, 10, 14), 64, 96)


def test_reads_the_old_file_format_of_torch(tiny_model: Folder, tmp_path: Path) -> None:
    file = saved(tmp_path, state(), _use_new_zipfile_serialization=False)
    assert convert(file, tiny_model("llama"), tmp_path / "adapter").num_blocks == 8


def test_a_score_head_is_kept_and_an_unchanged_base_weight_left_out(tiny_model: Folder, tmp_path: Path) -> None:
    from diablo_export.checkpoint import Checkpoint

    norm = Checkpoint.open(tiny_model("llama")).tensors["model.norm.weight"].read()
    value = state(**{"score.weight": torch.ones(3, 64), "model.norm.weight": torch.from_numpy(norm)})
    done = convert(saved(tmp_path, value), tiny_model("llama"), tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    assert done.skipped == [("model.norm.weight", "an unchanged weight of the base")]
    assert adapter.task_type == "SEQ_CLS" and adapter.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert adapter.saved["score.weight"].shape == (3, 64)


def test_every_misfit_is_listed(tiny_model: Folder, tmp_path: Path) -> None:
    value = {
        "model.layers.9.mlp.up_proj.block_A": torch.ones(8, 8, 12),
        "model.layers.0.mlp.up_proj.block_A": torch.ones(4, 8, 12),
        "model.layers.0.mlp.down_proj.block_A": torch.ones(64, 64, 64),
        "model.layers.0.self_attn.q_proj.block_A": torch.full((8, 8, 8), torch.inf),
        "model.layers.1.self_attn.q_proj.block_A": torch.ones(64, 64),
        "model.norm.weight": torch.zeros(64),
    }
    with pytest.raises(AdapterError, match="is no adapter for") as caught:
        convert(saved(tmp_path, value), tiny_model("llama"), tmp_path / "adapter")
    message = str(caught.value)
    assert "layers.9.mlp.up_proj: the base has no such linear layer" in message
    assert "layers.0.mlp.up_proj: blocks of shape (4, 8, 12) cover 4 × 8 = 32 positions" in message
    assert "layers.0.mlp.down_proj: blocks of shape (64, 64, 64) on 96 → 64 features: 2 would cover it" in message
    assert "layers.0.self_attn.q_proj.block_A: holds NaN or inf" in message
    assert "layers.1.self_attn.q_proj: blocks have shape (64, 64)" in message
    assert "model.norm.weight: neither blocks nor a score head" in message
    assert not (tmp_path / "adapter").exists()


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(zipped: bool, tiny_model: Folder, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = saved(tmp_path, state(extra=Attack(mark)), _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"would call posix\.system.*nothing in this file was run") as caught:
        convert(file, tiny_model("llama"), tmp_path / "adapter")
    assert not mark.exists() and "weights_only" not in str(caught.value)
    torch.load(file, weights_only=False)  # the attack is real
    assert mark.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"no entry ends in \.block_A; it holds nothing"),
        ({"lm_head.lora_A": torch.ones(2)}, r"no entry ends in \.block_A; it holds lm_head\.lora_A"),
        ([torch.ones(2)], "holds a list"),
        ({"a.block_A": torch.ones(2, dtype=torch.int64)}, r"must be a float tensor.*'a.block_A': torch\.int64"),
        ({"a.block_A": 3}, "found 'a.block_A': int"),
        (torch.nn.Linear(2, 2), "would call torch.nn.modules.linear.Linear"),
    ],
)  # fmt: skip
def test_files_that_are_no_adapters_are_refused(value: Any, message: str, tiny_model: Folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        convert(saved(tmp_path, value), tiny_model("llama"), tmp_path / "adapter")


@pytest.mark.parametrize("content", [b"", b"no pickle at all"])
def test_broken_files_are_refused(content: bytes, tiny_model: Folder, tmp_path: Path) -> None:
    (tmp_path / "adapter.chkpt").write_bytes(content)
    with pytest.raises(InputError, match=r"cut short, or torch\.save did not write it"):
        convert(tmp_path / "adapter.chkpt", tiny_model("llama"), tmp_path / "adapter")


def test_a_file_cut_short_and_a_missing_one_are_refused(tiny_model: Folder, tmp_path: Path) -> None:
    file = saved(tmp_path, state())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short"):
        convert(file, tiny_model("llama"), tmp_path / "adapter")
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "absent.chkpt", tiny_model("llama"), tmp_path / "adapter")


def test_writing_back_checks_the_base_and_the_file_name(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="does not belong to the model"):
        convert(tiny_adapter("llama"), tiny_model("qwen2"), tmp_path / "out.chkpt")
    convert(tiny_adapter("llama"), tiny_model("llama"), tmp_path / "out.chkpt")
    with pytest.raises(OutputError, match="exists already"):
        convert(tiny_adapter("llama"), tiny_model("llama"), tmp_path / "out.chkpt")
    convert(tiny_adapter("llama"), tiny_model("llama"), tmp_path / "out.chkpt", overwrite=True)
    with pytest.raises(OutputError, match="is a folder; give a file name"):
        convert(tiny_adapter("llama"), tiny_model("llama"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.chkpt"]


def test_blocks_of_a_quantized_base_are_not_written_as_ones_of_the_float_base(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    (tmp_path / "adapter").mkdir()
    dataclasses.replace(adapter, base_grid=BaseGrid(4, 32, True)).save(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"was trained beside int4 .* weights, which the paper's file cannot say"):
        convert(tmp_path / "adapter", tiny_model("llama"), tmp_path / "out.chkpt")
    assert not (tmp_path / "out.chkpt").exists()
