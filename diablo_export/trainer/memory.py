"""How much memory a run takes, known before its first step.

Weights, gradients and AdamW's moments are counted. Activations are worked out from shapes alone: one step goes through
the model with tensors that have a shape and no numbers, and what would be alive at once is added up. No memory is
taken for it, whatever the batch.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.processes import local


@dataclass(frozen=True)
class Memory:
    """Bytes of a run on one process, by what they hold."""

    weights: int  # of the frozen base, and what folding keeps of it
    trained: int  # blocks and head
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # at their most, between the forward and the backward pass

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def estimate(objective: Objective, parameters: Sequence[nn.Parameter], batch_size: int, length: int) -> Memory:
    """What a step on one batch takes.

    Args:
        objective: the model, with its blocks, and what is asked of it.
        parameters: the trained ones.
        batch_size: items that this process takes at once.
        length: tokens of the longest.

    Raises:
        RuntimeError: of torch, where a model's shapes depend on its numbers.
    """
    model = objective.model
    for layer in diablo_layers(model).values():
        if layer.fold is not None:
            layer.fold.hold(layer.blocks)  # here, where it is done with numbers
    trained = _bytes(parameters)
    frozen = _bytes([*model.parameters(), *model.buffers(), *_kept(model)]) - trained
    most = _activations(objective, parameters, batch_size, length)
    # the tracing counts gradients, too, as far as they are there at the highest point
    return Memory(frozen, trained, trained, 2 * trained, max(0, most - trained))


def per_item(objective: Objective, parameters: Sequence[nn.Parameter], length: int) -> tuple[int, int]:
    """Activations in bytes as (what any batch takes, what each item adds)."""
    one, two = (estimate(objective, parameters, size, length).activations for size in (1, 2))
    return max(0, 2 * one - two), max(1, two - one)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had: on a GPU, what nobody holds, and what torch keeps unused; else what Linux says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: int = 0
        self.most: int = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, list | tuple) else [result]
        for value, spec in zip(made, func._schema.returns, strict=False):
            if isinstance(value, Tensor) and spec.alias_info is None:  # else a view, or written in place
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def _activations(objective: Objective, parameters: Sequence[nn.Parameter], batch_size: int, length: int) -> int:
    """Most bytes alive at once, of what a forward and a backward pass make."""
    model = objective.model
    training = model.training
    try:
        model.train()
        with FakeTensorMode(allow_non_fake_inputs=True), _Tracker() as tracker:
            ids = torch.zeros(batch_size, length, dtype=torch.int64, device=objective.device)
            with torch.autocast(objective.device.type, torch.bfloat16, enabled=objective.autocast):
                logits: Tensor = model(input_ids=ids).logits
            if not objective.classify:
                logits = logits[:, :-1].flatten(0, 1)
            logits = logits.float()
            labels = torch.zeros(len(logits), dtype=torch.int64, device=objective.device)
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            del logits
            torch.autograd.grad(loss, list(parameters), allow_unused=True)
    finally:
        model.train(training)
    return int(tracker.most)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind them, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in map(local, tensors)}
    return sum(storages.values())


def _kept(model: nn.Module) -> list[Tensor]:
    return [own for layer in diablo_layers(model).values() if layer.fold is not None for own in layer.fold.own]
