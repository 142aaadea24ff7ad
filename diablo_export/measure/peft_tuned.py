"""Adapters from PEFT in torch: the tuned model of a comparison, and what it is when a part of the adapter is lost."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from diablo_export.adapter import WEIGHTS, ordered_classes
from diablo_export.checkpoint import read_header, read_json
from diablo_export.errors import AdapterError, CheckpointError, require
from diablo_export.measure.peft_config import PeftAdapter
from diablo_export.trainer.model import load_base

_HEADS = ("classifier", "score", "out_proj")  # transformers' names of a classification head's last layer


def load(base: Path, adapter: PeftAdapter, **changes: Any) -> tuple[nn.Module, Any]:
    """A base with a PEFT adapter on it, in eval mode and float32, and its tokenizer.

    Args:
        base: Hugging Face folder.
        adapter: the adapter.
        changes: entries of its config to take another value.

    Raises:
        AdapterError: PEFT cannot put it on this base, or the folder lacks some of its weights.
        DependencyError: PEFT is not installed.
    """
    peft = require("peft", "peft")
    network, tokenizer = load_base(base, adapter.task, labels=_labels(base, adapter))
    config = peft.PeftConfig.from_pretrained(adapter.folder)
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        with _strict():
            model = peft.PeftModel.from_pretrained(network, adapter.folder, config=config)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, UserWarning) as error:
        raise AdapterError(
            f"{adapter.folder}: PEFT cannot put this {adapter.kind} adapter on {base}: {error}; give the base that it "
            f"was trained on ({adapter.config.get('base_model_name_or_path')})"
        ) from error
    # the model itself, with PEFT's layers in it: its forward is transformers' own
    return model.get_base_model().requires_grad_(False).eval(), tokenizer


def switch(model: nn.Module, on: bool) -> None:
    """Switch the adapters of PEFT's layers on or off; a classifier's trained head stays."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer.disable_adapters is on:
            layer.enable_adapters(on)
            layer.requires_grad_(False)  # enabling turns gradients on


def class_names(model: nn.Module) -> list[str]:
    """A classifier's class names in class order; empty where nobody named them."""
    names = ordered_classes(getattr(model.config, "id2label", None))
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """PEFT only warns of adapter weights that it looked for in vain; here that is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        yield


def _labels(base: Path, adapter: PeftAdapter) -> list[str] | None:
    """Names for as many classes as the adapter's saved head has, where the base has another number of them."""
    if adapter.task != "text-classification":
        return None
    try:
        infos, _ = read_header(adapter.folder / WEIGHTS)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    heads = [i.shape[0] for n, i in infos.items() if n.endswith(tuple(f"{h}.weight" for h in _HEADS))]
    named = read_json(base / "config.json").get("id2label") or {}
    return [f"LABEL_{index}" for index in range(heads[0])] if heads and heads[0] != len(named or "ab") else None
