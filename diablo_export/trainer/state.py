"""Training checkpoints: everything a run needs to go on, in safetensors and JSON, replaced in one step.

`state.safetensors` holds each trained parameter and AdamW's two moments of it; `state.json` the finished steps, the
settings and the log so far. Batches, learning rate and random numbers are functions of the step: there is nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diablo_export.checkpoint import read_header, read_json, write_safetensors
from diablo_export.errors import CheckpointError, InputError, indented
from diablo_export.output import new_folder
from diablo_export.trainer.processes import placed_like, whole

CHECKPOINT, TENSORS, STATE = "checkpoint", "state.safetensors", "state.json"
FORMAT_VERSION = 2  # 1: warm-up was a step ahead, so that such a run would not go on to its own weights
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS = {"step": int, "settings": dict, "log": list}


def save_state(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    settings: dict[str, Any],
    log: list[dict[str, Any]],
    write: bool = True,
) -> None:
    """Write a checkpoint after `step` finished steps; a kill leaves either the old one or this one.

    Of several processes all must come here, and one is to write.

    Raises:
        OutputError: no room, or not writable.
        InputError: a value that is not finite; nothing was written.
    """
    tensors = {name: whole(parameter.detach()).cpu().numpy() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment in _MOMENTS:
            tensors[f"{name}:{moment}"] = whole(optimizer.state[parameter][moment]).cpu().numpy()
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        kept = f"; {folder} keeps the one before" if folder.exists() else ""
        raise InputError(
            f"{broken[0]} holds NaN or infinity after step {step}, so that no checkpoint was written{kept}. "
            "Start anew with a lower --lr"
        )
    if not write:
        return
    layout = {name: ("F32", value.shape) for name, value in tensors.items()}
    with new_folder(folder, overwrite=True, needs=sum(value.nbytes for value in tensors.values())) as work:
        write_safetensors(work / TENSORS, layout, tensors.items())
        state = {"format_version": FORMAT_VERSION, "step": step, "settings": settings, "log": log}
        (work / STATE).write_text(json.dumps(state), encoding="utf-8")


def load_state(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> tuple[int, list[dict[str, Any]]]:
    """Put a checkpoint back into parameters and optimizer.

    Returns:
        the finished steps and the log so far.

    Raises:
        InputError: the run was started with other settings; lists each with both values.
        CheckpointError: files that are missing or broken.
    """
    state = read_json(folder / STATE)
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / STATE}: format_version is {state.get('format_version')!r}, not {FORMAT_VERSION}: another "
            "version of diablo-export began this run; go on with that one, or start anew with --overwrite"
        )
    broken = [name for name, kind in _KINDS.items() if not isinstance(state.get(name), kind)]
    if broken:
        raise CheckpointError(f"{folder / STATE}: has no usable {', '.join(broken)}; start anew with --overwrite")
    check_settings(folder, state["settings"], settings)
    infos, _ = read_header(folder / TENSORS)
    wanted = {f"{name}{part}" for name in parameters for part in ("", *(f":{moment}" for moment in _MOMENTS))}
    if set(infos) != wanted:
        raise CheckpointError(f"{folder / TENSORS}: holds other parameters than this run trains; start anew")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(placed_like(parameter, infos[name].read()))
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state["step"])),
            **{moment: placed_like(parameter, infos[f"{name}:{moment}"].read()) for moment in _MOMENTS},
        }
    return int(state["step"]), list(state["log"])


def unfinished(work: Path) -> bool:
    """Whether the folder of a run holds a checkpoint to go on from."""
    return (work / CHECKPOINT / STATE).exists()


def read_step(folder: Path) -> int:
    """How many steps the run of a checkpoint has finished."""
    return int(read_json(folder / STATE).get("step", 0))


def check_settings(folder: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Compare the settings of an unfinished run, as JSON holds them, with those that it is to go on with.

    Raises:
        InputError: lists each that differs, with both values.
    """
    # through JSON and back, as the stored ones went
    given = json.loads(json.dumps(given))
    different = [
        f"{name} was {_short(stored.get(name))}, now it is {_short(given.get(name))}"
        for name in sorted({*stored, *given})
        if stored.get(name) != given.get(name)
    ]
    if different:
        raise InputError(
            f"{folder}: the unfinished run was started with other settings, so it cannot go on to the same weights:\n"
            f"{indented(different)}\nResume with the same settings, or start anew with --overwrite"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
