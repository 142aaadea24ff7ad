"""The verb `quantize`: a float checkpoint in, the same model as a GPTQ checkpoint out, codes calibrated on text.

What it writes is a base as any other quantized checkpoint is: `train` learns beside it as it is, `merge` writes it
back, `export` keeps its codes. Embeddings, norms and heads stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diablo_export.adapter import TASKS, base_weight, stored_transposed
from diablo_export.base_grid import usual
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import DTYPE_NAMES, Checkpoint, TensorInfo, write_safetensors
from diablo_export.console import log, progress
from diablo_export.converters.base import hashing
from diablo_export.converters.calibration import Text, text_for
from diablo_export.converters.hf_folder import copy_others, write_index
from diablo_export.converters.merge_method import seed_faults
from diablo_export.converters.sizes import checkpoint_bytes
from diablo_export.errors import CheckpointError, InputError
from diablo_export.manifest import write_manifest
from diablo_export.output import check_output, keep_inputs, new_folder
from diablo_export.packed.fresh import FITTED, METHODS, config, fault, quantized, tensors
from diablo_export.packed.grid import PackedGrid
from diablo_export.quantization import check_layout
from diablo_export.trainer.model import load_base
from diablo_export.trainer.moments import InputMoments
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.packed_base import is_packed
from diablo_export.trainer.prepare import open_base
from diablo_export.trainer.targets import ALL, choose_targets

_LENGTH = 128  # tokens of a sequence
_JUDGED, _FITTED = 16, 160  # sequences: to measure on, to take moments of
_SHORT = 4  # so many more of a classifier's sentences, which are shorter
_BATCH = 8

Packed = dict[str, dict[str, Array]]  # tensors of each quantized weight, by the prefix of its stored names


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    bits: int = 4,
    group_size: int | None = None,
    asymmetric: bool | None = None,
    method: str = "calibrated",
    calibration: str | Path | None = None,
    task: str = "causal-lm",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model` with the linear layers of its blocks quantized, in GPTQ's format.

    Args:
        model: Hugging Face folder or id of a float model.
        output: the folder to write.
        bits: 2, 4 or 8.
        group_size: inputs that share a scale; None: see `base_grid.usual`.
        asymmetric: a zero point for each group; None: likewise.
        method: how codes are chosen, see `packed.fresh`.
        calibration: text that the layers' inputs are taken of; None: what the model writes, or, for a classifier,
            sentences of random tokens.
        task: causal-lm or text-classification: how text is read.
        seed: of text that is drawn.
        overwrite: replace `output` if it exists.

    Returns:
        The manifest; its `loss` is that of a language model on text held back, float and quantized.

    Raises:
        CheckpointError: a model that cannot be read, or is quantized already. InputError: bad options.
        DataError: text that cannot be used. OutputError: `output` exists, is not writable, or there is no room.
    """
    keep_inputs(output, model, calibration)
    check_output(output, overwrite)
    size, zeros = usual(task == "text-classification", group_size, asymmetric)
    _check(bits, size, method, task, seed)
    source = open_base(model)
    if is_packed(source):
        raise CheckpointError(f"{source.folder}: is quantized already; give the float model that it was made from")
    if stored_transposed(source.config):
        raise CheckpointError(
            f"{source.folder}: {source.config.get('model_type')} keeps its weights the other way round, as no GPTQ "
            "checkpoint is read here; train with --base-quantize, from the float model"
        )
    how = config(bits, size, symmetric=not zeros)
    said = {"bits": bits, "group_size": size, "asymmetric": zeros, "method": method, "task": task, "seed": seed}
    said |= {"model": str(model), "calibration": calibration and str(calibration)}
    room = new_folder(output, overwrite, checkpoint_bytes(source))
    with room as folder, hashing(model, source.folder, source.files) as base:
        network, tokenizer = load_base(source.folder, task)
        text = _text(network, tokenizer, calibration, task, seed, fitted=_FITTED if method in FITTED else 1)
        pad = tokenizer.pad_token_id or 0
        objective = Objective(network, False, pad, torch.device("cpu"), False)
        before = _loss(objective, text, task)
        moments = InputMoments(network, text.fitted, batch_size=_BATCH, pad=pad) if method in FITTED else None
        packed, modules = _pack(source, network, moments, how, method)
        loss = {"float": before, "quantized": _loss(objective, text, task)}
        _write(source, folder, packed)
        settings = json.dumps({**source.config, "quantization_config": how}, indent=2)
        (folder / "config.json").write_text(settings + "\n", encoding="utf-8")
        copy_others(source, folder)
        more = {"task": task, "format": "hf", "quantize": f"int{bits}", "text": text.origin}
        return write_manifest(folder, "quantize", said, base(), [], modules, None, **more, loss=loss)


def _check(bits: int, size: int, method: str, task: str, seed: int) -> None:
    check_layout(bits, size)
    for wrong in seed_faults(seed):
        raise InputError(wrong)
    for name, value, allowed in (("method", method, METHODS), ("task", task, tuple(TASKS))):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def _text(
    network: nn.Module, tokenizer: Any, calibration: str | Path | None, task: str, seed: int, fitted: int
) -> Text:
    classifier = task == "text-classification"
    how: dict[str, Any] = {"length": _LENGTH, "classifier": classifier, "judged": _JUDGED}
    how["fitted"] = fitted * (_SHORT if classifier else 1)
    return text_for(calibration, network, tokenizer, seed=seed, writer="the model", **how)


def _loss(objective: Objective, text: Text, task: str) -> float | None:
    """A language model's, per token of the text that nothing is fitted to."""
    return objective.evaluate(text.judged, _BATCH)["eval_loss"] if task == "causal-lm" else None


def _pack(
    source: Checkpoint, network: nn.Module, moments: InputMoments | None, how: dict[str, Any], method: str
) -> tuple[Packed, list[dict[str, Any]]]:
    """Quantize the linear layers of the model's blocks, one after the other; the network gets their values."""
    targets = choose_targets(network, ALL)
    _refuse_absent(source, targets)
    found: dict[str, PackedGrid] = {}
    modules = []
    with progress("quantizing", len(targets)) as advance:
        for name in targets:
            weight = base_weight(source, name)
            outputs, inputs = weight.shape
            why = fault((outputs, inputs), how["bits"])
            if why is None:
                seen = None if moments is None else moments(name)
                found[name] = quantized(weight, how["bits"], how["group_size"], how["sym"], method, seen)
            entry = {"name": name, "in_features": inputs, "out_features": outputs}
            modules.append({**entry, "action": "kept" if why else "quantized", "why": why or method})
            advance(1)
    _tell(modules)
    for name, grid in found.items():
        network.get_submodule(name).get_parameter("weight").data.copy_(torch.from_numpy(grid.values()))
    return {_prefix(source, name): tensors(grid, how) for name, grid in found.items()}, modules


def _tell(modules: list[dict[str, Any]]) -> None:
    kept = [entry for entry in modules if entry["action"] == "kept"]
    if len(kept) == len(modules):
        raise InputError(f"no layer can be quantized: {kept[0]['name']}: {kept[0]['why']}; take more bits")
    if kept:
        log.warning("%d of %d layers stay float: %s: %s", len(kept), len(modules), kept[0]["name"], kept[0]["why"])


def _refuse_absent(source: Checkpoint, targets: list[str]) -> None:
    absent = [name for name in targets if source.find(f"{name}.weight") is None]
    if absent:
        raise CheckpointError(
            f"{source.folder}: stores these modules under other names than the loaded model has: "
            f"{', '.join(absent[:5])}; it cannot be quantized here"
        )


def _prefix(source: Checkpoint, name: str) -> str:
    info = source.find(f"{name}.weight")
    assert info is not None
    return info.name.removesuffix("weight")


def _write(source: Checkpoint, folder: Path, packed: Packed) -> None:
    """Each weight file anew, with the tensors of quantized weights where the weights were."""
    written: dict[str, dict[str, int]] = {}
    for file in sorted(source.metadata):
        parts: dict[str, Array | TensorInfo] = {}
        for info in sorted((info for info in source if info.file.name == file), key=lambda info: info.start):
            prefix = info.name.removesuffix("weight")
            parts.update({prefix + suffix: value for suffix, value in packed.get(prefix, {}).items()})
            if prefix not in packed:
                parts[info.name] = info
        layout = {name: _kind(part) for name, part in parts.items()}
        values = ((name, part.read() if isinstance(part, TensorInfo) else part) for name, part in parts.items())
        write_safetensors(folder / file, layout, values, source.metadata[file])
        written[file] = {name: part.nbytes for name, part in parts.items()}
    write_index(source, written, folder)


def _kind(part: Array | TensorInfo) -> tuple[str, tuple[int, ...]]:
    """The name of its dtype, and its shape."""
    return part.dtype if isinstance(part, TensorInfo) else DTYPE_NAMES[part.dtype], part.shape
