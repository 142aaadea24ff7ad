"""What a run trains: blocks beside a base's layers and a classifier's head; and the adapter that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from diablo_export.adapter import TASKS, AdaptedModule, Adapter, stored_transposed
from diablo_export.base_grid import BaseGrid
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import CheckpointError
from diablo_export.fingerprint import Fingerprint, fingerprint
from diablo_export.packed.modules import stored
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.model import text_config
from diablo_export.trainer.packed_layer import LookedUpLinear, QuantizedLinear
from diablo_export.trainer.processes import whole
from diablo_export.trainer.targets import ALL, choose_targets, short_names, wrap_targets


@dataclass(frozen=True)
class Learner:
    """A network with blocks."""

    network: Any
    head: Sequence[str]  # names of the parameters that are trained whole
    targets: list[str]  # as adapter_config.json names them
    marks: dict[str, Fingerprint]  # of the base's weights, by adapted module
    num_blocks: int
    base_digest: str  # tells one base from another, in hex

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: blocks and head, as they are now."""
        named = dict(self.network.named_parameters())
        blocks = {f"{name}.diablo_blocks": layer.blocks for name, layer in diablo_layers(self.network).items()}
        return blocks | {name: named[name] for name in self.head}

    def adapter(self, model: str | Path, task: str, labels: list[str] | None, grid: BaseGrid | None) -> Adapter:
        """The adapter as it is trained now, for the base `model`; every process must ask for it."""
        parameters = self.parameters
        return Adapter(
            {
                name: AdaptedModule(
                    name, whole(layer.blocks.detach()).cpu().numpy(), layer.shape.in_features,
                    layer.shape.out_features, self.marks[name],
                )
                for name, layer in diablo_layers(self.network).items()
            },
            TASKS[task],
            str(Path(model).resolve()) if Path(model).is_dir() else str(model),
            self.num_blocks,
            self.targets,
            {name: whole(parameters[name].detach()).cpu().numpy() for name in self.head},
            labels or [],
            base_grid=grid,
        )  # fmt: skip


def put_blocks(
    network: Any,
    head: Sequence[str],
    checkpoint: Checkpoint,
    target_modules: str | Sequence[str] | None,
    num_blocks: int,
) -> Learner:
    """Put zero blocks beside the targets of a frozen network, and have its head trained, in float32.

    Args:
        network: of `checkpoint`.
        head: names of its parameters to train whole.
        checkpoint: is read for the fingerprints of the targets' weights.
        target_modules: see `choose_targets`.
        num_blocks: of each module.

    Raises:
        InputError: targets or a number of blocks that do not fit.
        CheckpointError: a target that the checkpoint does not hold.
    """
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    targets = choose_targets(network, wanted, exclude=owners(head))
    marks = _fingerprints(checkpoint, targets)
    digest = _base_digest(network, checkpoint, marks, {*head, *(f"{name}.weight" for name in targets)})
    wrap_targets(network, targets, num_blocks)
    text_config(network).use_cache = False
    for name in head:
        parameter = network.get_parameter(name)
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    names = short_names(network, targets) if not wanted or ALL in wanted else wanted
    return Learner(network, head, names, marks, num_blocks, digest)


def owners(parameters: Sequence[str]) -> set[str]:
    """The modules that these parameters belong to."""
    return {name.rpartition(".")[0] for name in parameters}


def _base_digest(network: nn.Module, checkpoint: Checkpoint, marks: Mapping[str, Fingerprint], but: set[str]) -> str:
    """Of the base's configuration, its targets' fingerprints, and everything else that it holds `but` those."""
    digest = hashlib.sha256(json.dumps([checkpoint.config, [mark.xxh3_128 for mark in marks.values()]]).encode())
    codes = {
        f"{path}.{name}": value for path, layer in network.named_modules()
        if isinstance(layer, QuantizedLinear | LookedUpLinear) and f"{path}.weight" not in but
        for name, value in layer.named_buffers()
    }  # fmt: skip
    for name, value in (network.state_dict() | codes).items():
        if name not in but:
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name}:{xxhash.xxh3_128_hexdigest(plain.data)}".encode())
    return digest.hexdigest()


def _fingerprints(checkpoint: Checkpoint, targets: Sequence[str]) -> dict[str, Fingerprint]:
    """The fingerprint of each target's weight as the checkpoint stores it, or stands for; read one at a time."""
    found, absent = {}, []
    for name in targets:
        info, packed = checkpoint.weight_of(name), stored(checkpoint, name)
        if packed is not None:
            found[name] = fingerprint(packed.unpacked().values())
        elif info is None:
            absent.append(name)
        else:
            weight = info.read()
            found[name] = fingerprint(weight.T if stored_transposed(checkpoint.config, name) else weight)
    if absent:
        raise CheckpointError(
            f"{checkpoint.folder}: stores these modules under other names than the loaded model has, so that blocks "
            f"could not be merged into them: {', '.join(absent[:5])}; choose other --target-modules"
        )
    return found
