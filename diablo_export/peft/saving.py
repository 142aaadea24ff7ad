"""What the adapter format says of each module and only the model knows: sizes, fingerprints, whole modules, labels."""

from __future__ import annotations

from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from diablo_export.adapter import PREFIX, module_entry
from diablo_export.fingerprint import Fingerprint, fingerprint
from diablo_export.peft.base import class_names
from diablo_export.peft.config import DiabloConfig
from diablo_export.peft.layer import DiabloLayer, plain_name


def describe(model: nn.Module, config: DiabloConfig, adapter_name: str) -> None:
    """Give the config what it needs to be saved as one of this project's adapters."""
    modules: dict[str, Any] = {}
    whole: set[str] = set()
    for wrapped, module in model.named_modules():
        name = plain_name(wrapped).removeprefix(PREFIX)
        if isinstance(module, DiabloLayer) and adapter_name in module.diablo_shapes:
            modules[name] = module_entry(module.diablo_shapes[adapter_name], _mark(module, name, config))
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            owners = [key.rpartition(".")[0] for key in module.modules_to_save[adapter_name].state_dict()]
            whole.update(f"{name}.{owner}" if owner else name for owner in owners)
    config.describe(modules=modules, modules_to_save=sorted(whole) or None, labels=_labels(model, config))


def _mark(layer: DiabloLayer, name: str, config: DiabloConfig) -> Fingerprint | None:
    """The base weight's fingerprint; that of the loaded adapter where the base is quantized or sharded."""
    weight = layer.base_weight()
    if weight is not None:
        return fingerprint(weight)
    known: dict[str, Any] = (config.modules or {}).get(name) or {}
    return Fingerprint.from_json(known["fingerprint"]) if known.get("fingerprint") else None


def _labels(model: nn.Module, config: DiabloConfig) -> list[str] | None:
    """Class names of a classifier, in class order; None keeps those that the adapter came with."""
    names = class_names(model)
    if config.task_type != "SEQ_CLS" or not names:
        return None
    invented = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return None if invented and len(config.labels or []) == len(names) else names
