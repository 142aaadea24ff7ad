"""The tuner: how PEFT puts DiaBlo's layers into a model, checks the base against the adapter, and saves."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from diablo_export.adapter import SUFFIX
from diablo_export.blockdiag import BlockShape
from diablo_export.errors import InputError, shortened
from diablo_export.peft.base import check_base, check_tensors
from diablo_export.peft.config import DiabloConfig, DiabloPeftError
from diablo_export.peft.layer import BASE, DiabloLayer, is_mergeable, linear_sizes, plain_name, refusal
from diablo_export.peft.saving import describe
from diablo_export.trainer.hooks import removed_after
from diablo_export.trainer.targets import ALL, PAPER


class DiabloModel(BaseTuner):
    """A model with DiaBlo adapters; made by `peft.get_peft_model` and `PeftModel.from_pretrained`."""

    prefix = "diablo_"
    tuner_layer_cls = DiabloLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name; the model itself tells, below

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if isinstance(peft_config, DiabloConfig) and peft_config.modules and state_dict is None:
            # a bare config comes from inject_adapter_in_model; transformers' loader then looks for other tensor names,
            # finds none, and would go on with zero blocks: the base, silently
            raise DiabloPeftError(
                "transformers' own loader (load_adapter, or from_pretrained of an adapter folder) does not fill these "
                "blocks; load the base, then peft.PeftModel.from_pretrained(base, folder), or "
                "peft.AutoPeftModelForCausalLM.from_pretrained(folder)"
            )
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # missing targets are chosen from the model's layers, in _prepare_model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.modules:
            check_base(model, peft_config)
            return
        if peft_config.target_modules is None:
            peft_config.target_modules = set(default_targets(model))
        if str(peft_config.target_modules).lower() == ALL:
            peft_config.target_modules = _all_linear(model, peft_config)
        _check_targets(model, peft_config)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if peft_config.modules:
            return plain_name(key) in peft_config.modules  # a stored adapter: exactly its modules
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        shape = _shape(target, peft_config, current_key)
        layer = target if isinstance(target, DiabloLayer) else DiabloLayer(target, adapter_name)
        layer.add_adapter(adapter_name, shape, zeros=peft_config.init_weights, frozen=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is not trained until it is made active
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        packed = {
            name: type(layer.base_layer).__name__
            for name, layer in self.model.named_modules()
            if isinstance(layer, DiabloLayer) and not is_mergeable(layer.base_layer)
        }
        if packed:
            raise DiabloPeftError(refusal(shortened([f"{name}: {kind}" for name, kind in packed.items()])))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one adapter for each row of the batch, to the layers; PEFT enters this context."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams") or 1  # generation repeats each row that often
        repeated = [name for name in names for _ in range(beams)]
        both = getattr(
            getattr(self.model, "config", None), "is_encoder_decoder", False
        )  # an encoder sees each row once
        unrepeated = set(self.model.get_encoder().modules()) if both else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_give_names, adapter_names=names if module in unrepeated else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, DiabloLayer | AuxiliaryTrainingWrapper)
        ]
        with removed_after(handles):
            yield

    def _check_adapter_names(self, names: list[str]) -> None:
        if self.training:
            raise DiabloPeftError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, DiabloLayer) for name in layer.diablo_blocks}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise DiabloPeftError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        describe(model, config, adapter_name)  # PEFT asks for the tensors right before it saves the config
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Parameter name → tensor name in the file; PEFT also builds the way back from it."""
        key = plain_name(key)
        ending = f"{SUFFIX}.{adapter_name}.weight"
        if key.endswith(ending):
            return key.removesuffix(ending) + SUFFIX
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if config.modules:
            check_tensors(state_dict, config)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def default_targets(model: nn.Module) -> list[str]:
    """The paper's projections where the model has all of them, else every linear layer of its numbered blocks."""
    inside = [
        name
        for name, module in model.named_modules()
        if re.search(r"\.\d+\.", name) and (isinstance(module, DiabloLayer) or linear_sizes(module))
    ]
    inside = [name for name in inside if not name.endswith(".base_layer")]
    leaves = {name.rpartition(".")[2] for name in inside}
    within = {
        re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in inside
    }  # whole paths would ignore layers_to_transform
    if not inside:
        raise DiabloPeftError("Please specify `target_modules`: this model has no linear layers in numbered blocks")
    return list(PAPER) if leaves.issuperset(PAPER) else sorted(within)


def _all_linear(model: nn.Module, config: DiabloConfig) -> set[str]:
    """The linear layers that PEFT means by it, and those that hold blocks already, which it does not know as linear."""
    chosen: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
    whole: Any = model
    head = whole.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return set(chosen.target_modules) | {
        name for name, part in model.named_modules() if isinstance(part, DiabloLayer) and part is not head
    }


def _check_targets(model: nn.Module, config: DiabloConfig) -> None:
    """Refuse, before anything is changed, targets that are no linear layers or too small for `num_blocks`."""
    faults, inside = [], ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue  # within a layer that has adapters already
        inside = f"{name}." if isinstance(module, DiabloLayer) else ""
        if name and check_target_module_exists(config, name):
            try:
                _shape(module, config, name)
            except DiabloPeftError as error:
                faults.append(str(error))
    if faults:
        raise DiabloPeftError("these target modules cannot take blocks:\n" + "\n".join(shortened(faults)))


def _shape(module: nn.Module, config: DiabloConfig, name: str) -> BlockShape:
    """How the blocks lie on a module: as the adapter stores them, or for the asked `num_blocks`.

    Raises:
        DiabloPeftError: no linear layer, or too small a one.
    """
    sizes = (module.in_features, module.out_features) if isinstance(module, DiabloLayer) else linear_sizes(module)
    if sizes is None:
        raise DiabloPeftError(
            f"{name}: Target module {type(module).__name__} is not supported; "
            "blocks go beside linear layers (torch.nn.Linear, Conv1D, and quantized ones)"
        )
    stored = (config.modules or {}).get(plain_name(name))
    try:
        if stored:
            return BlockShape(*sizes, *(stored[key] for key in ("num_blocks", "block_size_in", "block_size_out")))
        return BlockShape.for_linear(*sizes, config.num_blocks)
    except InputError as error:
        raise DiabloPeftError(f"{name}: {error}") from error


def _give_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
