"""DeepSpeed's ZeRO in the loop: each process steps a part of what is trained, and keeps that part's optimizer state.

What a step is stays with the loop: its batches, learning rate, clipping, and the numbers that it refuses. What counts
of DeepSpeed's configuration is how it lays out memory and communication. Stage 1 spreads the optimizer's state, stage 2
the gradients too; weights, as stage 3 cuts them, are FSDP 2's work here.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diablo_export.errors import InputError, require

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OURS = ("optimizer", "scheduler", "fp16", "bf16")  # sections that would change what a step is


def read_config() -> dict[str, Any]:
    """The configuration that `accelerate launch` was given for DeepSpeed, as a file or as options.

    Raises:
        InputError: one that blocks cannot be trained by; lists all that is wrong with it.
        DependencyError: DeepSpeed is not installed.
    """
    from accelerate import DeepSpeedPlugin

    try:
        config: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    except (ValueError, OSError) as error:
        raise InputError(f"accelerate cannot read its DeepSpeed configuration: {error}") from error
    check_config(config)
    with _on_standard_error():
        require("deepspeed", "deepspeed")
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what would train something else than was asked for.

    Raises:
        InputError: lists every entry at fault.
    """
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    faults = [
        f"{name}: steps are the trainer's own; leave it out, and give --lr, --schedule, --weight-decay and --dtype"
        for name in _OURS
        if (section := config.get(name)) and section.get("enabled", True) is True
    ]
    if stage not in (1, 2):
        faults.append(
            f"zero_optimization.stage is {stage}; it must be 1 or 2. To cut the base's weights as stage 3 does, use "
            "FSDP 2 (accelerate launch --use_fsdp --fsdp_version 2); for stage 0 plain processes (--multi_gpu)"
        )
    faults += [
        f"zero_optimization.{name}: not supported; leave it out"
        for name in ("offload_optimizer", "offload_param")
        if ((zero.get(name) or {}).get("device") or "none") != "none"
    ]
    if faults:
        raise InputError("\n".join(f"accelerate's DeepSpeed configuration: {fault}" for fault in faults))


class Zero:
    """An AdamW that DeepSpeed steps, as the loop and its checkpoints see any optimizer."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        *,
        count: int,
        clip: float | None,
    ) -> None:
        """Have DeepSpeed spread the state of `optimizer` over `count` processes; trained parameters move into buffers.

        Args:
            network: holds what `optimizer` steps, and frozen weights.
            optimizer: an AdamW that has not stepped yet.
            config: DeepSpeed's.
            count: processes; all must come here.
            clip: largest norm of the gradient, or None.
        """
        own = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip or 0.0}
        given = {key: value for key, value in _without_auto(config).items() if key != "train_batch_size"}
        with _on_standard_error():
            deepspeed: Any = require("deepspeed", "deepspeed")
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=network, optimizer=optimizer, config={**given, **own}
            )
        self._count = count

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Where learning rates are set."""
        groups: list[dict[str, Any]] = self._zero.param_groups
        return groups

    @property
    def state(self) -> Zero:
        """The moments by parameter, whole; every process must ask for them, and give them."""
        return self

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        return {moment: safe_get_full_optimizer_state(parameter, moment) for moment in _MOMENTS}

    def __setitem__(self, parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._begin(values["step"])
        safe_set_full_fp32_param(parameter, parameter.detach())  # what the next step starts from is a copy
        for moment in _MOMENTS:
            safe_set_full_optimizer_state(parameter, values[moment], moment)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a loss's gradients up over the processes; `last`: of the step's batches."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._count, scale_wrt_gas=False)  # DeepSpeed takes the mean

    def norm(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """The norm of the gradient of all processes; `step` clips it."""
        norm: Tensor = self._zero.scaled_global_norm()
        return norm

    def step(self) -> None:
        """Step, each process its part, and tell the others."""
        self._engine.step()

    def zero_grad(self) -> None:
        """Nothing: `step` has done it."""

    def _begin(self, step: Tensor) -> None:
        """Give this process's part the moments that an AdamW has from its first step on."""
        inner = self._zero.optimizer
        fresh = [part for group in inner.param_groups for part in group["params"] if part not in inner.state]
        for part in fresh:
            inner.state[part] = {"step": step.clone(), **{moment: torch.zeros_like(part) for moment in _MOMENTS}}
        if fresh:
            self._zero._lazy_init_hp_params_optimizer_state()


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration leaves to whoever reads it is left to DeepSpeed's defaults."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != "auto"
    }


@contextlib.contextmanager
def _on_standard_error() -> Iterator[None]:
    """DeepSpeed says on standard output what it does: results belong there."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
