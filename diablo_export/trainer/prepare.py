"""What any training run begins with: a base is loaded, and its data is read and encoded for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diablo_export.adapter import ordered_classes
from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log, progress
from diablo_export.errors import CheckpointError, DataError, InputError
from diablo_export.packed.modules import refuse_unreadable
from diablo_export.trainer.batches import encode_all, hold_out
from diablo_export.trainer.data import Encoded, Example, class_names, read_examples
from diablo_export.trainer.model import head_parameters, load_with_fresh, positions, text_config
from diablo_export.trainer.packed_base import is_packed


@dataclass(frozen=True)
class Lesson:
    """A frozen base, and what it is to learn."""

    network: Any
    dtype: str  # that the base was loaded in
    head: list[str]  # names of the parameters to train whole: a classifier's
    labels: list[str] | None  # class names in class order; None for a language model
    pad: int  # the token id that fills short items up
    max_length: int
    items: list[Encoded]
    held: list[Encoded]  # kept out of training


def prepare(
    checkpoint: Checkpoint,
    data: str | Path,
    *,
    task: str,
    autocast: bool,
    device: str | torch.device,
    max_length: int | None,
    eval_data: str | Path | None,
    eval_fraction: float,
    seed: int,
) -> Lesson:
    """Load a base and read its data.

    Args:
        checkpoint: of the base.
        data: the file, see `data.read_examples`.
        task: `causal-lm` or `text-classification`.
        autocast: whether matrix products run in bfloat16.
        device: where the base is loaded to.
        max_length: tokens per item; None: see `item_length`.
        eval_data: held-out file.
        eval_fraction: the share of `data` that is held out instead.
        seed: of the lines held out.

    Raises:
        InputError: bad data, or a model that cannot be loaded.
    """
    examples = read_examples(data)
    classes = known_classes(examples, data, checkpoint, task)
    labels = None if classes is None else [str(name) for name in classes]
    dtype = base_dtype(checkpoint, autocast)
    network, tokenizer, fresh = load_with_fresh(checkpoint.folder, task, dtype=dtype, device=device, labels=labels)
    if classes is None:
        check_causal(network, checkpoint)
    max_length = item_length(network, max_length)
    how = {"tokenizer": tokenizer, "max_length": max_length, "classes": classes}
    running = classes is None and examples[0].form == "text"
    items, held = hold_out(encode_file(data, examples, **how), eval_fraction, seed, running)
    if eval_data:
        others = read_examples(eval_data)
        if classes is None:
            _refuse_labels(others, eval_data, task)
        held = encode_file(eval_data, others, **how)
    if classes is not None and getattr(network.config, "is_encoder_decoder", False):
        _check_ends(network.config.eos_token_id, [*items, *held], checkpoint, tokenizer)
    head = [] if labels is None else head_parameters(network, fresh)
    return Lesson(network, dtype, head, labels, tokenizer.pad_token_id or 0, max_length, items, held)


def open_base(model: str | Path, grid: BaseGrid | None = None) -> Checkpoint:
    """The Hugging Face checkpoint of a base, whose weights are to be laid on `grid`.

    Raises:
        CheckpointError: it is none, or cannot be read, or its weights are codes of another grid.
    """
    place = Path(model)
    if place.suffix == ".onnx" or (any(place.glob("*.onnx")) and not any(place.glob("*.safetensors"))):
        raise CheckpointError(
            f"{model}: an ONNX model, which cannot be trained; give the Hugging Face model that it was made from, with "
            "--base-quantize int4 where it is to run in int4"
        )
    checkpoint = Checkpoint.open(model)
    refuse_unreadable(checkpoint)
    if grid is not None and is_packed(checkpoint):
        if grid.on_grid:
            raise CheckpointError(
                f"{checkpoint.folder}: is quantized already, and with --on-grid blocks begin at the float weights, "
                "which it no longer has; give the float model that it was made from"
            )
        raise CheckpointError(
            f"{checkpoint.folder}: is quantized already; leave out --base-quantize to train beside its weights as they "
            "are, or give the float model that it was made from"
        )
    return checkpoint


def known_classes(
    examples: list[Example], data: str | Path, checkpoint: Checkpoint, task: str
) -> list[str | int] | None:
    """Class labels in class order: the base's own order, where it is a classifier of the same classes.

    Raises:
        DataError: labels that the task does not learn, or none where it needs them.
    """
    if task != "text-classification":
        _refuse_labels(examples, data, task)
        return None
    classes = class_names(examples, data)
    own = ordered_classes(checkpoint.config.get("id2label"))
    by_name = {str(name): name for name in classes}
    if sorted(by_name) == sorted(own):
        return [by_name[name] for name in own]
    if any(name != f"LABEL_{number}" for number, name in enumerate(own)):
        log.warning(
            "%s has the classes %s; the data's are %s, in this order: its head is %s", checkpoint.folder,
            ", ".join(own), ", ".join(by_name), "trained on" if len(own) == len(classes) else "made anew",
        )  # fmt: skip
    return classes


def _refuse_labels(examples: list[Example], data: str | Path, task: str) -> None:
    if examples[0].label is not None:
        raise DataError(f"{data}: has labels, which --task {task} does not learn; give --task text-classification")


def _check_ends(end: int, items: list[Encoded], checkpoint: Checkpoint, tokenizer: Any) -> None:
    """Encoders with a decoder (BART, T5) classify at the last end token, and want as many of them in every text.

    Raises:
        DataError: a text that has none, or several.
    """
    for item in items:
        if (count := int((item.ids == end).sum())) != 1:
            why = "let its tokenizer add that to every text" if count == 0 else "take that out of the text"
            raise DataError(
                f"{checkpoint.folder}: classifies at the token {tokenizer.decode([end])!r}, of which every text must "
                f"have one; line {item.line} has {count}: {why}"
            )


def base_dtype(checkpoint: Checkpoint, autocast: bool) -> str:
    """Under autocast a bfloat16 base stays as it is; any other is computed from in float32, so no bit of it is lost."""
    stored = {info.dtype for info in checkpoint if info.dtype.startswith(("F", "BF"))}
    return "bfloat16" if autocast and stored == {"BF16"} else "float32"


@torch.no_grad()
def check_causal(network: Any, checkpoint: Checkpoint) -> None:
    """Refuse a model that sees the token it is to predict: it would learn to copy it, and its loss would fall to zero.

    Raises:
        CheckpointError: an encoder such as BERT, which transformers loads as a causal model all the same.
    """
    text_config(network).use_cache = False  # some have none for so short a text
    first, second = (
        network(input_ids=torch.tensor([[1, 2, 3, last]], device=network.device)).logits[:, :-1].float()
        for last in (4, 5)
    )
    # 0 but for rounding where experts get other numbers of tokens: 2e-8 in float32, in bfloat16 some steps of 4e-3
    limit = 5e-4 if network.dtype == torch.float32 else 2e-2
    if (first - second).abs().max() > limit * (first.max() - first.min()):
        raise CheckpointError(
            f"{checkpoint.folder}: is no causal language model: its answer for a token changes with the tokens behind "
            "it, so that it sees what it is to predict. Give a decoder, is_decoder in config.json where it was trained "
            "as one, or --task text-classification"
        )


def item_length(network: Any, max_length: int | None) -> int:
    """Tokens per item: as asked, else 512 or what the model takes when less.

    Raises:
        InputError: more than the model has positions.
    """
    limit = positions(network)
    if max_length is not None and max_length > limit:
        raise InputError(f"--max-length is {max_length}, but the model has {limit} positions; give {limit} or less")
    return max_length or int(min(limit, 512))


def encode_file(path: str | Path, examples: list[Example], **how: Any) -> list[Encoded]:
    """The items of a file by `encode_all`, whose options these are; says what had to be left out or cut.

    Raises:
        DataError: nothing left, or an unknown label; names the file.
    """
    with progress("tokenizing", len(examples)) as advance:
        try:
            items, dropped = encode_all(examples, advance=advance, **how)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    if dropped:
        log.warning(
            "%s: left out %d of %d lines, which have nothing to predict within --max-length (the first is line %d)",
            path, len(dropped), len(examples), dropped[0],
        )  # fmt: skip
    if cut := [item for item in items if item.lost]:
        log.warning(
            "%s: %d of %d lines are longer than --max-length and lose their end (the first is line %d; the longest has "
            "%d tokens)", path, len(cut), len(examples), cut[0].line, max(len(item.ids) + item.lost for item in cut),
        )  # fmt: skip
    return items
