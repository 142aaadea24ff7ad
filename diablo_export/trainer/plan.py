"""What a run will take, said before it starts (`train --dry-run`), and what would fit where memory is short."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from diablo_export.console import log
from diablo_export.errors import InputError
from diablo_export.trainer.batches import Batches
from diablo_export.trainer.loop import Step
from diablo_export.trainer.memory import estimate, free_memory, per_item
from diablo_export.trainer.model import checkpoint_activations
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.packed_layer import LookedUpLinear, QuantizedLinear

_TIMED = 2  # steps; the first one warms up
_SHORTEST = 32  # tokens; nobody wants to train on fewer


def make_plan(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    batches: Batches,
    *,
    steps: int,
    try_steps: Callable[..., None],
) -> dict[str, Any]:
    """Parameters, memory, steps, tokens and time of a run; two steps of it are done to time them, if they fit.

    Args:
        objective: the model with its blocks.
        parameters: the trained ones.
        batches: of the run.
        steps: of the run.
        try_steps: `train_loop` with all but steps and after_step.

    Raises:
        InputError: a model whose shapes depend on its numbers.

    Returns:
        `parameters` and `trainable` (numbers), `memory` in bytes by kind and as `total`, `free` bytes now (the
        weights are loaded already), `fits`, `steps`, `tokens`, `seconds_per_step` and `seconds` (without
        evaluations), `advice` where it does not fit.
    """
    length = max(len(item.ids) for item in batches.items)
    own = -(-batches.batch_size // objective.processes.count)
    try:
        memory, free = estimate(objective, parameters, own, length), free_memory(objective.device)
    except RuntimeError as error:
        raise InputError(
            f"what {type(objective.model).__name__} takes cannot be worked out from shapes alone ({error}); train it "
            "without --dry-run"
        ) from error
    needed = memory.total - memory.weights - memory.trained
    plan: dict[str, Any] = {
        "parameters": _count(objective.model),
        "trainable": sum(parameter.numel() for parameter in parameters),
        "memory": {**dataclasses.asdict(memory), "total": memory.total},
        "free": free,
        "fits": free is None or needed <= free,
        "batch_size": batches.batch_size,
        "longest": length,
        "steps": steps,
        "tokens": round(sum(len(item.ids) for item in batches.items) * steps / batches.steps_per_epoch),
        "seconds_per_step": None,
        "seconds": None,
        "advice": None,
    }
    if not plan["fits"]:
        plan["advice"] = advice(objective, parameters, batches, needed - memory.activations)
        return plan
    done: list[Step] = []
    try_steps(steps=_TIMED, after_step=done.append)
    plan["seconds"] = done[-1].seconds / done[-1].tokens * plan["tokens"]
    plan["seconds_per_step"] = plan["seconds"] / steps
    return plan


def describe(plan: dict[str, Any]) -> str:
    """A plan as a person reads it."""
    memory = plan["memory"]
    kinds = ", ".join(f"{kind} {_size(memory[kind])}" for kind in memory if kind != "total")
    lines = [
        f"parameters  {plan['parameters']:,}, trained {plan['trainable']:,} "
        f"({plan['trainable'] / plan['parameters']:.2%})",
        f"memory      {_size(memory['total'])}: {kinds}",
        f"            in batches of {plan['batch_size']} items of up to {plan['longest']} tokens"
        + (f"; {_size(plan['free'])} are free beside the weights" if plan["free"] is not None else ""),
        f"steps       {plan['steps']:,}, of {plan['tokens']:,} tokens in all",
    ]
    if plan["seconds"] is not None:
        lines.append(f"time        {_time(plan['seconds'])}, {plan['seconds_per_step']:.3g} s a step")
    if plan["advice"]:
        lines.append(f"It does not fit. {plan['advice']}")
    return "\n".join(lines)


def advice(objective: Objective, parameters: Sequence[nn.Parameter], batches: Batches, beside: int) -> str:
    """What would fit into the memory that is free now.

    Args:
        objective: the model; afterwards it recomputes activations in backward passes.
        parameters: the trained ones.
        batches: that did not fit.
        beside: bytes that will be taken beside activations.
    """
    free, count = free_memory(objective.device), objective.processes.count
    length = max(len(item.ids) for item in batches.items)
    own = -(-batches.batch_size // count)
    base, item = per_item(objective, parameters, length)
    if free is None:
        return f"Each item of {length} tokens takes {_size(item)}: lower --batch-size, and raise --grad-accumulation"
    room = free - beside
    found = []
    fitting = min((room - base) // item, own - 1)
    whole = batches.batch_size * batches.accumulation
    sizes = [size for size in range(1, fitting * count + 1) if whole % size == 0]
    if sizes:
        found.append(f"--batch-size {sizes[-1]} --grad-accumulation {whole // sizes[-1]} (the same steps)")
    for shorter in _halves(length):
        fixed, each = per_item(objective, parameters, shorter)
        if fixed + own * each <= room:
            found.append(f"--max-length {shorter}")
            break
    with contextlib.suppress(ValueError, AttributeError):  # models that cannot
        checkpoint_activations(objective.model)
        fixed, each = per_item(objective, parameters, length)
        if fixed + own * each <= room:
            found.append(f"--gradient-checkpointing ({_size(fixed + own * each)} of activations, a third more time)")
    said = f"Batches of {own} items of {length} tokens take {_size(base + own * item)} of activations"
    said += f" ({_size(item)} an item); {_size(max(0, room))} are free for them. "
    if not found:
        return f"{said}Not even one item fits: use a smaller model, shorter --max-length, or a larger machine"
    return f"{said}What would fit: {'; or '.join(found)}"


@contextlib.contextmanager
def memory_advice(objective: Objective, parameters: Sequence[nn.Parameter], batches: Batches) -> Iterator[None]:
    """Turn running out of memory into a message with numbers.

    Raises:
        InputError: memory ran out within; says what would fit.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        who = f"process {objective.processes.rank + 1} of {objective.processes.count}: " * (
            objective.processes.count > 1
        )
        first = str(error).strip().partition("\n")[0][:200]
        traceback.clear_frames(error.__traceback__)  # which hold what would not fit
        objective.model.zero_grad()
        if objective.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            words = advice(objective, parameters, batches, 3 * sum(p.numel() * p.element_size() for p in parameters))
        except RuntimeError as other:  # of torch, see `estimate`
            log.debug("no estimate: %s", other)
            words = "Lower --batch-size, raise --grad-accumulation by as much, or give --gradient-checkpointing"
        raise InputError(f"{who}out of memory ({first}). {words}") from error


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _count(model: nn.Module) -> int:
    """Weights of a model, packed or not."""
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear | LookedUpLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in packed)


def _halves(length: int) -> Iterator[int]:
    while (length := length // 2) >= _SHORTEST:
        yield length


def _size(count: int) -> str:
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if count >= pair[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
