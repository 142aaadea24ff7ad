"""What lies beside the weights in a Hugging Face folder: config.json, the shard index, tokenizer and the rest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diablo_export.adapter import Adapter, head_classes
from diablo_export.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from diablo_export.console import log
from diablo_export.errors import CheckpointError
from diablo_export.output import MANIFEST, REPORTS

# weights of the untuned base in other formats: copied beside the merged ones they would ship the wrong model
OTHER_WEIGHTS = (
    ".bin", ".ckpt", ".gguf", ".h5", ".index.json", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth",
    ".safetensors",
)  # fmt: skip
_DECODERS_HEAD = "score."  # as transformers calls it in all decoders but CTRL


def write_config(checkpoint: Checkpoint, adapter: Adapter, folder: Path, untied: bool = False) -> None:
    """config.json as it was, but for the classes of a new head and an output head that is no longer tied."""
    config = dict(checkpoint.config)
    if adapter.classifies:
        config |= classifier_config(config, adapter) | padding(checkpoint, adapter.saved)
    if untied:
        config["tie_word_embeddings"] = False  # tied, a loader would put the embeddings over the merged head
    if config == checkpoint.config:
        shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def classifier_config(config: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The entries of config.json that make AutoModelForSequenceClassification load the adapter's head."""
    changes: dict[str, Any] = {}
    labels = adapter.labels or [f"LABEL_{i}" for i in range(head_classes(adapter.saved))]
    if labels:
        changes["id2label"] = {str(i): label for i, label in enumerate(labels)}
        changes["label2id"] = {label: i for i, label in enumerate(labels)}
        changes["num_labels"] = len(labels)
    family = re.match(r"(.+?)(LMHeadModel|Model|For[A-Z]\w*)$", (config.get("architectures") or [""])[0])
    if family:
        changes["architectures"] = [f"{family[1]}ForSequenceClassification"]
    return changes


def padding(checkpoint: Checkpoint, saved: Iterable[str]) -> dict[str, int]:
    """The entry of config.json that a decoder which classifies knows padding by: it reads the last token that is none.

    As `trainer.model` has it: the tokenizer's, else the one of config.json, else the token that ends a text. None where
    no file says which id that is: config.json is to be believed. Nothing changes where the head, saved or in
    the checkpoint, is no decoder's: RoBERTa counts its positions from that entry.
    """
    if not any(name.startswith(_DECODERS_HEAD) for name in (*saved, *checkpoint.tensors)):
        return {}
    named: int | None = checkpoint.config.get("pad_token_id")
    settings, content, vocabulary = (
        read_json(file) if (file := checkpoint.folder / name).exists() else {}
        for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json")
    )
    added = {token["content"]: int(index) for index, token in (settings.get("added_tokens_decoder") or {}).items()}
    all_ids = _token_ids(content) or vocabulary
    ids = all_ids | added
    own = [settings.get(key) for key in ("pad_token", "eos_token", "unk_token")]
    pad, *others = [ids.get(token["content"] if isinstance(token, dict) else token) for token in own]
    # where a file says of added tokens alone, any id that config.json names may be a token's
    usable = named if named in ids.values() or (ids and not all_ids and (named or 0) >= 0) else None
    found = next((one for one in (pad, usable, *others) if one is not None), None)
    return {} if found is None else {"pad_token_id": found}


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[Any, int]:
    """Ids by token, of a tokenizer.json."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram's: tokens and scores
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def write_index(checkpoint: Checkpoint, files: Mapping[str, Mapping[str, int]], folder: Path) -> None:
    """The shard index of `files` (file name → tensor name → bytes), where the base has one."""
    if SINGLE in checkpoint.metadata:
        return
    index = read_json(checkpoint.folder / INDEX)
    total = sum(size for tensors in files.values() for size in tensors.values())
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    index["weight_map"] = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer, the generation config and whatever else is neither a weight nor written anew.

    Raises:
        CheckpointError: links to files that are no more, as a cache has that was cleaned by hand.
    """
    kept = [path for path in checkpoint.folder.iterdir() if not path.name.endswith(OTHER_WEIGHTS)]
    lost = sorted(path.name for path in kept if path.name[0] != "." and not path.exists())
    if lost:
        raise CheckpointError(
            f"{checkpoint.folder}: {', '.join(lost)}: links to what is no more; download the model again"
        )
    written = {"config.json", INDEX, *checkpoint.metadata, MANIFEST, *REPORTS}

    others: list[str] = []

    def copy(source: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            if path.name.startswith(".") or (source == checkpoint.folder and path.name in written):
                continue
            if path.name.endswith(OTHER_WEIGHTS):
                others.append(path.name)
            elif path.is_dir():
                copy(path, target / path.name)
            else:  # without its mode: of a folder that nobody may write to, the output is ours all the same
                shutil.copyfile(path, target / path.name)

    copy(checkpoint.folder, folder)
    if others:
        log.info("not copied, they hold weights of the base: %s", ", ".join(sorted(others)))
