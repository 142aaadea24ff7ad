"""Hugging Face models in torch: the base, and the base with an adapter on it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from diablo_export.adapter import TASKS, Adapter, refuse_base
from diablo_export.checkpoint import Checkpoint, decoder_class
from diablo_export.errors import CheckpointError, InputError
from diablo_export.packed.modules import check_base, refuse_unreadable
from diablo_export.trainer.layer import DiabloLinear, features, takes_blocks
from diablo_export.trainer.packed_base import is_packed, load_packed
from diablo_export.trainer.quantized import round_base

_FAULTS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)  # of transformers, on bad folders
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "stored": "auto",
}


def load_base(
    model: str | Path,
    task: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    labels: list[str] | None = None,
) -> tuple[nn.Module, Any]:
    """A frozen base model in eval mode, and its tokenizer.

    Args:
        model: Hugging Face folder or id.
        task: `causal-lm` or `text-classification`.
        dtype: `float32`, `bfloat16`, `float16`, `float64`, or `stored`: as the checkpoint holds it.
        device: where the model goes.
        labels: class names of a classifier; a head of another size is made anew (with torch's random numbers).

    Raises:
        CheckpointError: the folder is no model, lacks weights, or cannot be loaded for this task.
    """
    network, tokenizer, _ = load_with_fresh(model, task, dtype=dtype, device=device, labels=labels)
    return network, tokenizer


def load_with_fresh(
    model: str | Path,
    task: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    labels: list[str] | None = None,
) -> tuple[Any, Any, list[str]]:
    """`load_base`, and the names of parameters that the checkpoint does not hold: a fresh head."""
    checkpoint = Checkpoint.open(model)
    _check_loadable(checkpoint, task, dtype)
    more: dict[str, Any] = {}
    if task == "text-classification" and labels is not None:
        names = dict(enumerate(labels))
        more = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        more["num_labels"] = len(labels)
    try:
        with _quiet():
            if is_packed(checkpoint):
                network, info = load_packed(checkpoint, task, _DTYPES[dtype], **more)
            else:
                network, info = _auto(checkpoint, task).from_pretrained(
                    checkpoint.folder, dtype=_DTYPES[dtype], output_loading_info=True,
                    ignore_mismatched_sizes=True, **more,
                )  # fmt: skip
    except _FAULTS as error:
        raise CheckpointError(
            f"{model}: transformers cannot load it for {task}: {_first_line(error)}; choose a model for this task, or "
            "another --task"
        ) from error
    if info["mismatched_keys"] and not more:  # else a head of another size is made anew
        shown = [
            f"{name} is {list(found)}, by config.json {list(said)}"
            for name, found, said in sorted(info["mismatched_keys"])
        ]
        raise CheckpointError(f"{model}: config.json is another model's: {'; '.join(shown[:3])}; copy both again")
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if fresh and task == "causal-lm":
        raise CheckpointError(f"{model}: lacks weights that a {task} model needs: {', '.join(fresh[:5])}")
    tokenizer = _load_tokenizer(model, checkpoint, network)
    _set_padding(network, tokenizer)
    return network.requires_grad_(False).eval().to(device), tokenizer, fresh


def _auto(checkpoint: Checkpoint, task: str) -> Any:
    classifier = "AutoModelForSequenceClassification"
    return getattr(transformers, decoder_class(checkpoint.config) if task == "causal-lm" else classifier)


def load_empty(model: str | Path, task: str, *, labels: list[str] | None = None) -> tuple[Any, Any]:
    """`load_base` with parameters that take no memory, for `fill` to load those that are needed."""
    checkpoint = Checkpoint.open(model)
    _check_loadable(checkpoint, task, "float32")
    more = {} if labels is None else {"num_labels": len(labels)}
    try:
        with _quiet(), accelerate.init_empty_weights():
            config = transformers.AutoConfig.from_pretrained(checkpoint.folder, **more)
            if checkpoint.has_own_head():
                config.tie_word_embeddings = False
            make: Any = _auto(checkpoint, task).from_config
            network = make(config, dtype=torch.float32)
        network.tie_weights()
    except _FAULTS as error:
        raise CheckpointError(f"{model}: transformers cannot make it for {task}: {error}") from error
    tokenizer = _load_tokenizer(model, checkpoint, network)
    _set_padding(network, tokenizer)
    return network.requires_grad_(False).eval(), tokenizer


def _load_tokenizer(model: str | Path, checkpoint: Checkpoint, network: Any) -> Any:
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    except _FAULTS as error:
        raise CheckpointError(
            f"{model}: transformers finds no tokenizer in it that it can load ({_first_line(error)}); copy "
            "tokenizer.json and tokenizer_config.json there from where the model comes from"
        ) from error
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > 1.1 * rows:  # some models have a few tokens, such as one for images, that no text comes to
        raise CheckpointError(
            f"{model}: its tokenizer has {len(tokenizer):,} tokens, and the model embeddings for {rows:,}: it is "
            "another model's; copy tokenizer.json and tokenizer_config.json there from where the model comes from"
        )
    return tokenizer


def fill(module: nn.Module, path: str, checkpoint: Checkpoint, saved: Mapping[str, Any]) -> None:
    """Load the parameters of a part of an empty model, float32, and its buffers where the checkpoint holds them.

    Args:
        module: the part.
        path: its module path; "" is the model.
        checkpoint: holds the values.
        saved: values by parameter name that come first: an adapter's head.

    Raises:
        CheckpointError: lists what the checkpoint does not hold under these names.
    """
    parameters = list(module.named_parameters(path, remove_duplicate=False))
    tied: dict[int, list[str]] = {}  # the checkpoint may hold either of their names
    for name, parameter in parameters:
        tied.setdefault(id(parameter), []).append(name)
    absent = []
    for name, parameter in module.named_parameters(path):
        names = tied[id(parameter)]
        given = next((saved[each] for each in names if each in saved), None)
        stored = next((found for each in names if (found := checkpoint.find(each)) is not None), None)
        if given is None and stored is not None:
            given = stored.read()
        if given is None:
            absent.append(name)
            continue
        value = np.asarray(given, np.float32)
        if value.shape != parameter.shape:
            absent.append(f"{name} of shape {list(parameter.shape)}, found {list(value.shape)}")
            continue
        owner, _, leaf = name.removeprefix(path).removeprefix(".").rpartition(".")
        loaded = nn.Parameter(torch.from_numpy(np.ascontiguousarray(value)), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, loaded)
    if absent:
        raise CheckpointError(f"{checkpoint.folder}: cannot be loaded in parts: lacks {', '.join(absent[:5])}")
    for name, buffer in module.named_buffers(path):
        if (stored := checkpoint.tensors.get(name)) is not None and stored.shape == tuple(buffer.shape):
            buffer.copy_(torch.from_numpy(np.asarray(stored.read(), np.float32)))
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter on a base: wrap its modules with their blocks, and take over its saved head.

    Raises:
        AdapterError: lists every module or parameter that the model lacks or has in another size.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    faults = [
        f"{name}: {fault}"
        for name, module in adapter.modules.items()
        if (fault := _fault(modules.get(name), module.in_features, module.out_features))
    ]
    faults += [
        f"{name}: the adapter stores {list(value.shape)}, the model has {_shape(parameters.get(name))}"
        for name, value in adapter.saved.items()
        if name not in parameters or tuple(parameters[name].shape) != value.shape
    ]
    refuse_base(adapter, str(getattr(model, "name_or_path", "")) or type(model).__name__, faults)
    for name, module in adapter.modules.items():
        wrap(model, name, blocks=torch.from_numpy(module.blocks.astype(np.float32)))
    first = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapter.saved.items():
            if name not in first:  # a head tied to the embeddings, which stay as they are
                owner, _, leaf = name.rpartition(".")
                parameters[name] = nn.Parameter(parameters[name].clone(), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, parameters[name])
            parameters[name].copy_(torch.from_numpy(value.astype(np.float32)))


def load_tuned(
    model: str | Path, adapter: Adapter, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any]:
    """A base with its adapter, in eval mode, and its tokenizer; on the grid that the adapter was trained on.

    Raises:
        CheckpointError: the model cannot be loaded.
        AdapterError: the adapter was not trained on this model.
    """
    checkpoint = Checkpoint.open(model)
    check_base(checkpoint, adapter)
    network, tokenizer = load_base(model, adapter.task, dtype=dtype, device=device, labels=adapter.labels or None)
    if adapter.base_grid is not None and not is_packed(checkpoint):  # the weights that the blocks were trained beside
        round_base(network, adapter.base_grid, leave={name.rpartition(".")[0] for name in adapter.saved})
    attach(network, adapter)
    return network, tokenizer


def wrap(model: nn.Module, name: str, *, blocks: Tensor | None = None, num_blocks: int | None = None) -> DiabloLinear:
    """Replace the linear layer at module path `name` by a DiabloLinear around it."""
    layer = DiabloLinear.from_linear(model.get_submodule(name), blocks, num_blocks)
    replace_module(model, name, layer)
    return layer


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at module path `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def checkpoint_activations(model: Any) -> None:
    """Compute each block's activations again in the backward pass rather than keep them.

    Not by re-entrant backward passes: these need inputs that require gradients, which frozen embeddings do not give.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def head_parameters(model: nn.Module, fresh: list[str]) -> list[str]:
    """Names of the parameters to train whole for classification: all outside the encoder, and all fresh ones."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    return [name for name, _ in model.named_parameters() if not name.startswith(body) or name in fresh]


def _check_loadable(checkpoint: Checkpoint, task: str, dtype: str) -> None:
    if task not in TASKS:
        raise InputError(f"task is {task!r}; it must be {' or '.join(TASKS)}")
    if dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    refuse_unreadable(checkpoint)


def text_config(network: nn.Module) -> Any:
    """The configuration of the part that reads text: of most models the whole."""
    config: Any = network.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary_size(network: nn.Module, unknown: int = 1) -> int:
    """How many tokens a network knows; `unknown` where its config does not say."""
    return int(getattr(text_config(network), "vocab_size", None) or unknown)


def positions(network: nn.Module) -> float:
    """How many tokens a text may have; inf where the config does not say.

    RoBERTa and its kind count from behind the padding's position, so that they take fewer than the config says.
    """
    config = text_config(network)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or math.inf
    tables = [table for name, table in network.named_modules() if name.endswith("position_embeddings")]
    padded = [
        table.padding_idx for table in tables if isinstance(table, nn.Embedding) and table.padding_idx is not None
    ]
    return math.inf if limit < 0 else limit - max(padded, default=-1) - 1  # XLNet's way to say none


def _set_padding(network: Any, tokenizer: Any) -> None:
    """Give tokenizer and model the same padding token: decoders classify at the last token that is none.

    Where they name different ones it is the tokenizer's, with which texts are padded.
    """
    named = getattr(network.config, "pad_token_id", None)
    if tokenizer.pad_token is None and named is not None and 0 <= named < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(named)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is not None:
        network.config.pad_token_id = tokenizer.pad_token_id


def _fault(module: nn.Module | None, in_features: int, out_features: int) -> str | None:
    """Why a module cannot take blocks for a layer of these sizes, or None."""
    if module is None:
        return "the model has no such module"
    if isinstance(module, DiabloLinear):
        return "has blocks already"
    if not takes_blocks(module):
        return f"is a {type(module).__name__}, not a linear layer"
    if (found := features(module)) == (in_features, out_features):
        return None
    return f"the model's layer is {found[0]} → {found[1]}, the adapter's is {in_features} → {out_features}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _shape(parameter: Tensor | None) -> str:
    return "no such parameter" if parameter is None else str(list(parameter.shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and load reports: what matters of them becomes errors here."""
    logging: Any = transformers.utils.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
