"""What lies beside the weights of a Hugging Face folder: the padding of classifiers, and links that lead nowhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters import torch_graph
from diablo_export.converters.hf_folder import copy_others, padding, write_config
from diablo_export.converters.onnx_nodes import Weights
from diablo_export.errors import CheckpointError
from tests.tiny import rewrite

Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("named", "tokens", "expected"),
    [
        (7, {"pad_token": "<pad>"}, 0),  # texts are padded by the tokenizer
        (-1, {"pad_token": {"content": "<pad>"}}, 0),
        (7, {"pad_token": None, "eos_token": "</s>"}, 7),
        (None, {"eos_token": "</s>"}, 2),
    ],
)
def test_a_classifying_decoder_knows_padding_by_its_tokenizer(
    named: int | None, tokens: dict[str, Any], expected: int, tiny_model: Folder, tmp_path: Path
) -> None:
    base = rewrite(tiny_model("llama"), tmp_path / "base", lambda name, value: (name, value), pad_token_id=named)
    (base / "tokenizer_config.json").write_text(json.dumps(tokens))
    saved = {"score.weight": np.ones((2, 64), np.float32)}
    adapter = Adapter({}, "SEQ_CLS", saved=saved, labels=["a", "b"])
    checkpoint = Checkpoint.open(base)
    write_config(checkpoint, adapter, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == expected
    graph = torch_graph._config(Weights(checkpoint, None, saved), "text-classification")
    assert graph.pad_token_id == expected
    # as older tokenizers are saved: GPT-2's whole vocabulary, or Llama's added tokens
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "seven": 7}))
    assert padding(checkpoint, saved) == {"pad_token_id": expected}
    (base / "vocab.json").unlink()
    added = {str(index): {"content": token} for index, token in enumerate(("<pad>", "<s>", "</s>"))}
    (base / "tokenizer_config.json").write_text(json.dumps({**tokens, "added_tokens_decoder": added}))
    assert padding(checkpoint, saved) == {"pad_token_id": expected}
    (base / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert padding(checkpoint, saved) == {}


def test_an_encoder_keeps_its_padding(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    base = rewrite(tiny_model("bert"), tmp_path / "base", lambda name, value: (name, value), pad_token_id=7)
    (base / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    checkpoint, adapter = Checkpoint.open(base), Adapter.load(tiny_adapter("bert"))
    write_config(checkpoint, adapter, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 7
    assert torch_graph._config(Weights(checkpoint, None, adapter.saved), "text-classification").pad_token_id == 7


def test_links_to_files_that_are_no_more(tiny_model: Folder, tmp_path: Path) -> None:
    """As in a cache of Hugging Face's whose blobs were removed by hand."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("../../blobs/gone")
    checkpoint = Checkpoint.open(model)
    with pytest.raises(CheckpointError, match=r"model: tokenizer\.json: links to what is no more; download"):
        copy_others(checkpoint, tmp_path / "refused")
    (model / "tokenizer.json").unlink()
    (model / "pytorch_model.bin").symlink_to("../../blobs/gone")  # it would not be copied
    copy_others(checkpoint, tmp_path / "out")
