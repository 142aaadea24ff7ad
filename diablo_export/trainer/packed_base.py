"""A quantized Hugging Face checkpoint as a network whose weights stay packed, without the library that made it.

transformers loads what is stored as floats, by its own rules for names and ties; a quantized weight is a single zero
there, seen as large as the weight, until the packed layer takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from diablo_export.checkpoint import Checkpoint
from diablo_export.console import progress
from diablo_export.errors import CheckpointError
from diablo_export.packed.modules import all_stored, refuse_transposed, stored
from diablo_export.trainer.layer import features, is_linear
from diablo_export.trainer.packed_layer import from_stored


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's weights are quantized."""
    return bool(checkpoint.config.get("quantization_config"))


_MODELS: dict[str, Any] = {
    "causal-lm": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "text-classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}


def load_packed(checkpoint: Checkpoint, task: str, dtype: Any, **labels: Any) -> tuple[Any, dict[str, Any]]:
    """What transformers' `from_pretrained` gives, and its loading info, with packed layers for quantized weights.

    Args:
        checkpoint: in a format that `packed.modules.refuse_unreadable` passes.
        task: `causal-lm` or `text-classification`.
        dtype: of what is stored as floats.
        labels: id2label, label2id and num_labels of a classifier, where they are not the checkpoint's.

    Raises:
        CheckpointError: a quantized weight that is no linear layer of the model, or is GPT-2's; names it.
    """
    refuse_transposed(checkpoint)
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, **labels)
    del config.quantization_config
    network, info = _MODELS[task][type(config)].from_pretrained(
        None, config=config, state_dict=_floats(checkpoint), dtype=dtype, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    network.name_or_path = network.config.name_or_path = str(checkpoint.folder)
    if network.can_generate() and (checkpoint.folder / "generation_config.json").exists():
        network.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    _put_packed(network, checkpoint)
    return network, info


def _floats(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that are stored as floats, and for each quantized weight a zero of its shape."""
    quantized = all_stored(checkpoint)
    of_codes = {info.name for one in quantized for info in one.infos.values()}
    found: dict[str, Tensor] = {f"{one.prefix}weight": torch.zeros(1).expand(*one.shape) for one in quantized}
    for name in sorted(checkpoint.metadata):
        with safe_open(checkpoint.folder / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys() if key not in of_codes}  # noqa: SIM118
    return found


def _put_packed(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a packed layer in the place of each linear layer that the checkpoint holds quantized."""
    left = {one.prefix for one in all_stored(checkpoint)}
    with progress("unpacking", len(left)) as advance:
        for name, linear in list(network.named_modules()):
            one = stored(checkpoint, name) if is_linear(linear) else None
            if one is None or one.shape[::-1] != features(linear):
                continue
            bias = linear.bias if isinstance(linear.bias, Tensor) else None
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, from_stored(one.unpacked(), bias))
            left.discard(one.prefix)
            advance(1)
    if left:
        names = ", ".join(sorted(prefix.rstrip(".") for prefix in left)[:5])
        raise CheckpointError(
            f"{checkpoint.folder}: {len(left)} quantized weights are no linear layers of the model that transformers "
            f"makes of it, so that it cannot be loaded: {names}; give the float model"
        )
