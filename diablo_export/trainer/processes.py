"""Several processes that train one model: who takes which items, and what they tell each other.

torchrun or `accelerate launch` starts them. They share every batch, so that a step is the same step however many they
are: process r of n takes items r, r + n, … of each, and losses and gradients are added up over all of them. Each has
the whole model, or, where accelerate's configuration says FSDP 2, a part of each weight.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diablo_export.console import log
from diablo_export.errors import InputError, require
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.zero import read_config


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; alone, unless some program started several."""

    rank: int = 0
    count: int = 1
    accelerator: Any = None  # accelerate's, where there are several
    sharded: bool = False  # each process holds only a part of each weight
    deepspeed: dict[str, Any] | None = None  # its configuration, where it is to step

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, batch: Sequence[Encoded]) -> tuple[Sequence[Encoded], float]:
        """This process's items of a batch, and what they weigh.

        One that gets none takes the first item for nothing: all must go through the model together.
        """
        own = batch[self.rank :: self.count]
        return (own, 1.0) if own else (batch[:1], 0.0)

    def spread(self, model: nn.Module) -> None:
        """Cut the weights of a model among the processes, where these are sharded: new parameters take their places.

        The layers of each list of layers are put together one at a time, forward and backward.
        """
        if not self.sharded:
            return
        mesh = init_device_mesh(self.accelerator.device.type, (self.count,))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for module in [*(layer for layers in reversed(lists) for layer in layers), model]:
            part = fully_shard(module, mesh=mesh)
            part.set_gradient_divide_factor(1.0)  # gradients are added up, not averaged
            part.set_force_sum_reduction_for_comms(True)  # gloo can nothing else

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, added up over all processes."""
        if self.accelerator is None:
            return list(values)
        total: Tensor = self.accelerator.reduce(torch.tensor(values, device=self.accelerator.device), "sum")
        return total.tolist()

    def add_up(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Add up gradients (in place) and loss over all processes: all then take the same step.

        What a step left out, such as a layer that is dropped, gets a gradient of zero: it is stepped with all others,
        so that the optimizer's state follows from the number of the step.
        """
        if self.deepspeed is None:  # which keeps gradients elsewhere
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if self.accelerator is None:
            return loss
        if not self.sharded and self.deepspeed is None:  # else they were on their way back
            parts = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
            total = self.accelerator.reduce(torch.cat(parts), "sum")
            for parameter, part in zip(parameters, total.split([part.numel() for part in parts]), strict=True):
                parameter.grad = part.view_as(parameter)
        return self.sum([loss])[0]

    def any(self, here: bool) -> bool:
        """Whether something is so in any of the processes."""
        return self.sum([float(here)])[0] > 0

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


ALONE = Processes()


def join_processes(device: str, batch_size: int, packed: bool = False) -> Processes:
    """Meet the other processes that torchrun or `accelerate launch` started; there are none without them.

    Args:
        device: `cpu`, or anything else for this process's own GPU, if there is one.
        batch_size: items that they share.
        packed: whether the base's weights are quantized, which cannot be cut among them.

    Raises:
        InputError: a batch too small to share, or a configuration that blocks cannot be trained by.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return ALONE
    if batch_size < count:
        raise InputError(
            f"--batch-size is {batch_size}, which {count} processes share: give {count} or more, or start fewer"
        )
    require("accelerate", "train")
    from accelerate import Accelerator

    deepspeed = read_config() if _set("ACCELERATE_USE_DEEPSPEED") else None
    if _set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise InputError(
            "accelerate is configured for FSDP 1, which cannot mix frozen and trained weights of several types; "
            "set fsdp_version: 2 (accelerate launch --fsdp_version 2)"
        )
    if _set("ACCELERATE_USE_FSDP") and packed:
        raise InputError(
            "FSDP 2 does not cut up packed weights: give a float base without --base-quantize, or start plain processes"
        )
    with _unset("ACCELERATE_USE_DEEPSPEED"):  # which accelerate has for GPUs only
        accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")
    if accelerator.process_index:
        log.setLevel(logging.ERROR)  # the first one speaks for all
    return Processes(accelerator.process_index, count, accelerator, _set("ACCELERATE_USE_FSDP"), deepspeed)


def _set(name: str) -> bool:
    """Whether `accelerate launch` has switched something on, from its options or its configuration file."""
    return os.environ.get(name, "false").lower() in ("1", "true")


@contextlib.contextmanager
def _unset(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(parameter: Tensor, value: np.ndarray[Any, Any]) -> Tensor:
    """A whole value on a parameter's device, in its type, and cut among processes as it is."""
    tensor = torch.from_numpy(value).to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
