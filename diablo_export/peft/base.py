"""Is this the base that a stored adapter was trained on? Asked before PEFT puts the adapter into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from diablo_export.adapter import PREFIX, SUFFIX, ordered_classes
from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.errors import AdapterError, indented
from diablo_export.fingerprint import Fingerprint
from diablo_export.peft.config import DiabloConfig
from diablo_export.peft.layer import DiabloLayer, linear_sizes, plain_name

_SHOWN = 20


def check_base(model: nn.Module, config: DiabloConfig) -> None:
    """Compare sizes and, where the base is float, weights with what the adapter says of its base.

    Raises:
        AdapterError: lists every module that is missing, has other sizes, or other weights.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    stored = config.modules or {}
    faults = [f"{name}: {fault}" for name, entry in stored.items() if (fault := _fault(modules.get(name), entry))]
    labels, classes = config.labels, getattr(getattr(model, "config", None), "num_labels", None)
    if labels and hasattr(model, "num_labels") and classes is not None and len(labels) != classes:
        faults.append(
            f"the adapter has {len(labels)} classes ({', '.join(labels[:5])}), the model {classes}; "
            f"load the model with num_labels={len(labels)}"
        )
    names = class_names(model)
    if labels and names and names != labels and sorted(names) == sorted(labels):  # other names may be translations
        faults.append(
            f"the adapter's classes are {', '.join(labels[:5])}, the model's {', '.join(names[:5])}; "
            f"load the model with id2label={dict(enumerate(labels))}"
        )
    if faults:
        raise AdapterError(
            "the adapter does not belong to this model (it was trained on "
            f"{config.base_model_name_or_path or 'an unnamed base'}):\n{indented(faults, _SHOWN)}"
        )
    if config.base_quantization:
        log.warning(
            "the adapter was trained beside %s weights, which PEFT does not make: what it learned of those weights' "
            "errors does not fit this base. diablo-export has the trained model, in parity, export and merge",
            BaseGrid.from_json(config.base_quantization),
        )  # fmt: skip


def check_tensors(tensors: Iterable[str], config: DiabloConfig) -> None:
    """Compare the tensors of a stored adapter with the modules that its config lists: PEFT would leave blocks at zero.

    Raises:
        AdapterError: lists every module with blocks in one of the two alone.
    """
    listed = set(config.modules or {})
    found = {name.removeprefix(PREFIX).removesuffix(SUFFIX) for name in tensors if name.endswith(SUFFIX)}
    faults = [f"{name}: the adapter's file has no blocks for it" for name in sorted(listed - found)]
    faults += [f"{name}: has blocks, and adapter_config.json does not list it" for name in sorted(found - listed)]
    if faults:
        raise AdapterError(
            f"the adapter cannot be used; save it again where it was trained:\n{indented(faults, _SHOWN)}"
        )


def class_names(model: nn.Module) -> list[str]:
    """A classifier's class names in class order; empty where the model has none."""
    return ordered_classes(getattr(getattr(model, "config", None), "id2label", None))


def _fault(module: nn.Module | None, entry: dict[str, Any]) -> str | None:
    """Why a module is not the one that an adapter was trained on, or None."""
    if module is None:
        return "the model has no such module"
    layer = module if isinstance(module, DiabloLayer) else None
    sizes = (layer.in_features, layer.out_features) if layer else linear_sizes(module)
    if sizes is None:
        return f"is a {type(module).__name__}, not a linear layer"
    wanted = (entry["in_features"], entry["out_features"])
    if sizes != wanted:
        return f"the model's layer is {sizes[0]} → {sizes[1]}, the adapter's is {wanted[0]} → {wanted[1]}"
    weight = (layer or DiabloLayer(module, "")).base_weight()
    return _values_fault(weight, entry.get("fingerprint"))


def _values_fault(weight: Array | None, mark: dict[str, Any] | None) -> str | None:
    if weight is None or not mark or Fingerprint.from_json(mark).matches(weight):
        return None  # a quantized base is taken on trust: its values are not those that were trained on
    return "its base weight has other values than the one this adapter was trained on"
