"""The quantized modules of a Hugging Face checkpoint: which they are, and the codes and scales of each."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from diablo_export.adapter import AdaptedModule, Adapter, refuse_base, stored_transposed
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint, TensorInfo
from diablo_export.console import log
from diablo_export.errors import CheckpointError
from diablo_export.fingerprint import SAME_WEIGHT, positions
from diablo_export.packed import awq, bnb, compressed, gptq
from diablo_export.packed.bnb import LookedUp
from diablo_export.packed.grid import PackedGrid

FORMATS: Mapping[str, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
    "bitsandbytes": bnb,
}


_MARKS = tuple(f".{codec.MARK}" for codec in FORMATS.values())


@dataclass(frozen=True)
class Stored:
    """One quantized weight of a checkpoint."""

    name: str  # module path
    prefix: str  # of its tensors in the checkpoint
    infos: dict[str, TensorInfo]  # by what follows the prefix
    codec: ModuleType
    config: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        with self._broken_said():
            outputs, inputs = self.codec.sizes(self.infos, self.config)
        return outputs, inputs

    def read(self) -> dict[str, Array]:
        """Its tensors, by what follows the prefix."""
        return {suffix: info.read() for suffix, info in self.infos.items()}

    def unpacked(self, tensors: Mapping[str, Array] | None = None) -> PackedGrid | LookedUp:
        """Codes, scales and all else that makes the weight, of these tensors or of those that are stored.

        Raises:
            CheckpointError: what the format does not say; names the module.
        """
        with self._broken_said():
            found: PackedGrid | LookedUp = self.codec.unpacked(self.read() if tensors is None else tensors, self.config)
        return found

    @contextlib.contextmanager
    def _broken_said(self) -> Iterator[None]:
        """Whatever goes wrong while its tensors are put together is theirs, and says which module."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error
        except (LookupError, TypeError, ValueError, ArithmeticError, StopIteration) as error:
            there = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in self.infos.items())
            raise CheckpointError(
                f"{self.name}: its tensors ({there}) do not fit together or to the config's quantization_config "
                f"({type(error).__name__}: {error}); copy the checkpoint again"
            ) from error

    def size_fault(self, module: AdaptedModule) -> str | None:
        """Why this is no weight of the module's sizes, or None."""
        wanted = module.out_features, module.in_features
        if self.shape == wanted:
            return None
        return f"the model's weight is {list(self.shape)}, the adapter's is {list(wanted)} (out, in)"


def stored(checkpoint: Checkpoint, module: str) -> Stored | None:
    """The weight of the module at this path; None where it is not quantized."""
    codec = _codec(checkpoint)
    mark = codec and checkpoint.find(f"{module}.{codec.MARK}")
    return _stored(checkpoint, codec, module, mark.name.removesuffix(codec.MARK)) if codec and mark else None


def all_stored(checkpoint: Checkpoint) -> list[Stored]:
    """Every quantized weight of a checkpoint, named as it is stored."""
    codec = _codec(checkpoint)
    marks = [name for name in checkpoint.tensors if codec and name.endswith(f".{codec.MARK}")]
    prefixes = [name.removesuffix(codec.MARK) for name in marks] if codec else []
    return [_stored(checkpoint, codec, prefix.rstrip("."), prefix) for prefix in prefixes if codec]


def _codec(checkpoint: Checkpoint) -> ModuleType | None:
    config = checkpoint.config.get("quantization_config")
    return FORMATS.get(config.get("quant_method", "")) if isinstance(config, dict) else None


def _stored(checkpoint: Checkpoint, codec: ModuleType, module: str, prefix: str) -> Stored:
    names = {suffix: checkpoint.tensors.get(prefix + suffix) for suffix in (*codec.CHANGED, *codec.KEPT)}
    infos = {suffix: info for suffix, info in names.items() if info is not None}
    return Stored(module, prefix, infos, codec, checkpoint.config["quantization_config"])


def likeness_fault(module: AdaptedModule, weight: PackedGrid | LookedUp) -> str | None:
    """Why these values are not those of the adapter's base, or None."""
    if module.fingerprint is None:
        return None
    likeness = module.fingerprint.similarity(weight.values_at(*positions(*weight.shape)))
    if likeness >= SAME_WEIGHT:
        return None
    return f"has other values than the base weight (cosine of 64 samples {likeness:.2f})"


def is_very(module: AdaptedModule, weight: PackedGrid | LookedUp) -> bool:
    """Whether these are the values that the blocks were trained beside, and not only some like them."""
    mark = module.fingerprint
    return mark is None or mark.agrees(weight.values_at(*positions(*weight.shape)))


def warn_of_others(adapter: Adapter, very: Collection[bool]) -> None:
    """Say that an adapter meets weights that are like those of its base, and others: `is_very` of each."""
    if not all(very):
        log.warning(
            "the adapter %s: %d of %d adapted weights are not the very ones that it was trained beside, but those of "
            "its float model or of another quantization: what it learned of the errors of its own does not fit these",
            adapter.path or "", list(very).count(False), len(adapter.modules),
        )  # fmt: skip


def refuse_unreadable(checkpoint: Checkpoint) -> None:
    """Refuse a quantized checkpoint that is not in a format known here, or not in the one it names; a float one passes.

    Raises:
        CheckpointError: names the format and the ones that are known; or says that config.json names none.
    """
    config = checkpoint.config.get("quantization_config")
    if not config or not isinstance(config, dict):
        _refuse_unsaid(checkpoint, config)
        return
    method = config.get("quant_method", "an unnamed method")
    codec = FORMATS.get(method)
    fault = codec.fault(config) if codec else f"quantized with {method}, where {', '.join(FORMATS)} can be read"
    if codec and not fault and not all_stored(checkpoint):
        fault = f"says {method}, but no weight is stored so (no tensor is called *.{codec.MARK})"
    if fault:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: {fault}; give the float model it was made from "
            "(merge --quantize int4 then quantizes base and blocks together)"
        )
    if codec is compressed and (rounded := compressed.activations(config)):
        _warn_of_activations(checkpoint.folder / "config.json", rounded)


@functools.cache
def _warn_of_activations(path: Path, rounded: str) -> None:
    """Once a model: a command may open it several times."""
    log.warning(
        "%s: its runtime rounds activations too (%s); here only the weights are quantized: training, ONNX graphs and "
        "parity keep activations in float, so none of them shows what that rounding takes", path, rounded,
    )  # fmt: skip


def refuse_transposed(checkpoint: Checkpoint) -> None:
    """Refuse a quantized model whose float weights would lie the other way round than its codes.

    Raises:
        CheckpointError: names the architecture.
    """
    if stored_transposed(checkpoint.config):
        raise CheckpointError(
            f"{checkpoint.folder}: {checkpoint.config.get('model_type')} keeps its weights the other way round, and "
            "codes of them are merged into only; give the float model, to train with --base-quantize"
        )


def _refuse_unsaid(checkpoint: Checkpoint, config: object) -> None:
    """Refuse codes without a word on how to read them: AutoGPTQ once kept it in a file of its own."""
    codes = next((name for name in sorted(checkpoint.tensors) if name.endswith(_MARKS)), None)
    fault = f"quantization_config is {json.dumps(config)}, and must be an object" if config else None
    if codes and not config:
        fault = f"has no quantization_config, and {codes} holds codes"
    if fault:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: {fault}; put there what quantized the model says of it (older GPTQ "
            'models have it in quantize_config.json), with "quant_method"'
        )


def check_base(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Refuse a checkpoint that is not the adapter's base, in float or quantized, as `Adapter.check_base` does.

    Raises:
        AdapterError: lists every module that is missing, has other sizes, or other values.
        CheckpointError: it is quantized in a way that is not known here.
    """
    refuse_unreadable(checkpoint)
    found = {name: stored(checkpoint, name) for name in adapter.modules}
    packed = {name: one for name, one in found.items() if one is not None}
    faults, very = [], []
    for name, one in packed.items():
        module, fault = adapter.modules[name], one.size_fault(adapter.modules[name])
        if fault is None:
            weight = one.unpacked()
            fault = likeness_fault(module, weight)
            very.append(is_very(module, weight))
        faults += [f"{name}: {fault}"] if fault else []
    refuse_base(adapter, str(checkpoint.folder), faults)
    floats = {name: module for name, module in adapter.modules.items() if name not in packed}
    replace(adapter, modules=floats).check_base(checkpoint)
    warn_of_others(adapter, very)
