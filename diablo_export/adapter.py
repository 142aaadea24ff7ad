"""The adapter folder: adapter_config.json and adapter_model.safetensors, in PEFT's conventions.

One tensor per adapted module, `base_model.model.<module path>.diablo_blocks`, shape (num_blocks, block_size_in,
block_size_out); for classification the trained head beside them, `base_model.model.<module path>.weight` and
`.bias`, its module listed under `modules_to_save`. The config carries each module's sizes and the fingerprint of its
base weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import Array, BlockShape, shape_of
from diablo_export.checkpoint import DTYPE_NAMES, HEAD, Checkpoint, read_header, read_json, write_safetensors
from diablo_export.errors import AdapterError, CheckpointError, InputError, indented
from diablo_export.fingerprint import Fingerprint

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX = ".diablo_blocks"
FORMAT_VERSION = 1
TASKS = {"causal-lm": "CAUSAL_LM", "text-classification": "SEQ_CLS"}  # option value → PEFT's task_type
_FLOATS = ("F32", "F16", "BF16", "F64")
# fields of the config that are read, when they are not null → what each must be
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "modules": (dict, "an object"),
    "num_blocks": (int, "a whole number"),
    "target_modules": ((list, str), "a list of texts, or a text"),
    "modules_to_save": (list, "a list of texts"),
    "labels": (list, "a list of texts"),
    "base_model_name_or_path": (str, "a text"),
}


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module: its blocks, how they lie, and the base weight they were trained on."""

    name: str  # module path, such as model.layers.0.self_attn.q_proj
    blocks: Array  # (num_blocks, block_size_in, block_size_out)
    in_features: int
    out_features: int
    fingerprint: Fingerprint | None = None  # None: the adapter came from a file that carries none

    @property
    def shape(self) -> BlockShape:
        """Sizes of the module and of its blocks."""
        return shape_of(self.blocks, self.in_features, self.out_features)


@dataclass(frozen=True)
class Adapter:
    """Everything in an adapter folder."""

    modules: dict[str, AdaptedModule]  # by module path
    task_type: str = "CAUSAL_LM"
    base_model: str | None = None
    num_blocks: int = 0  # as asked for; a module's own count is in its blocks
    target_modules: list[str] = field(default_factory=list)
    saved: dict[str, Array] = field(default_factory=dict)  # parameter path → value, such as classifier.weight
    labels: list[str] = field(default_factory=list)  # class names, in class order; for SEQ_CLS
    path: Path | None = None
    base_grid: BaseGrid | None = None  # that the base's weights lay on while this was trained; None: float

    @property
    def modules_to_save(self) -> list[str]:
        """Modules whose parameters are stored whole, such as a classification head."""
        return sorted({name.rpartition(".")[0] for name in self.saved})

    @property
    def parameters(self) -> int:
        """Trained parameters: all blocks and saved modules."""
        return sum(m.blocks.size for m in self.modules.values()) + sum(v.size for v in self.saved.values())

    @property
    def task(self) -> str:
        """`task_type` as the option --task spells it.

        Raises:
            AdapterError: it is none of these.
        """
        for option, kind in TASKS.items():
            if kind == self.task_type:
                return option
        raise AdapterError(f"{self.path}: task_type is {self.task_type!r}; known are {', '.join(TASKS.values())}")

    @property
    def classifies(self) -> bool:
        """Whether it is for text classification."""
        return self.task_type == TASKS["text-classification"]

    def save(self, folder: Path) -> None:
        """Write the two files into `folder`, which must exist."""
        config = {
            "peft_type": "DIABLO",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "format_version": FORMAT_VERSION,
            "num_blocks": self.num_blocks,
            "target_modules": self.target_modules,
            "modules_to_save": self.modules_to_save or None,
            "inference_mode": True,
            "labels": self.labels or None,
            **({"base_quantization": self.base_grid.to_json()} if self.base_grid else {}),
            "modules": {name: module_entry(m.shape, m.fingerprint) for name, m in self.modules.items()},
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        tensors = {f"{PREFIX}{name}{SUFFIX}": module.blocks for name, module in self.modules.items()}
        tensors |= {f"{PREFIX}{name}": value for name, value in self.saved.items()}
        layout = {name: (DTYPE_NAMES[value.dtype], value.shape) for name, value in tensors.items()}
        write_safetensors(folder / WEIGHTS, layout, tensors.items(), {"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read and validate an adapter folder; every fault found is listed in one message.

        Raises:
            AdapterError: missing or truncated files, another kind of adapter, tensors and config that
                disagree, blocks that do not fit their module, NaN or inf.
        """
        folder = Path(folder)
        config, tensors = _read(folder)
        if config.get("peft_type") != "DIABLO":
            raise AdapterError(
                f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}; only DIABLO adapters are read here. "
                "Merge other kinds with PEFT first"
            )
        if config.get("format_version") != FORMAT_VERSION:
            raise AdapterError(
                f"{folder / CONFIG}: format_version is {config.get('format_version')!r}, this program reads "
                f"{FORMAT_VERSION}; use the program version that wrote it"
            )
        _refuse(folder, _config_faults(config))
        modules, faults = _modules(config, tensors)
        saved = {n: v for n, v in tensors.items() if not n.endswith(SUFFIX)}
        faults += _saved_faults(saved, config.get("modules_to_save") or [])
        faults += [
            f"{name}: holds {v.dtype}; it must be one of {', '.join(_FLOATS)}"
            for name, v in tensors.items()
            if DTYPE_NAMES[v.dtype] not in _FLOATS
        ]
        faults += [f"{name}: holds NaN or inf" for name, v in tensors.items() if not np.isfinite(v).all()]
        if not modules and not faults:
            faults = ["no blocks at all"]
        _refuse(folder, faults)
        targets = config.get("target_modules") or []
        return cls(
            modules=modules,
            task_type=config.get("task_type") or "CAUSAL_LM",
            base_model=config.get("base_model_name_or_path"),
            num_blocks=int(config.get("num_blocks") or 0),
            target_modules=[targets] if isinstance(targets, str) else targets,
            saved=saved,
            labels=list(config.get("labels") or []),
            path=folder,
            base_grid=BaseGrid.from_json(grid) if (grid := config.get("base_quantization")) else None,
        )

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that is not the base these blocks were trained on.

        Sizes are always compared; weights wherever the adapter carries a fingerprint. Reads one tensor at a time.

        Raises:
            AdapterError: lists every module that is missing, has other sizes, or other weights.
        """
        faults: list[str] = []
        for name, module in self.modules.items():
            info = checkpoint.weight_of(name)
            if info is None:
                faults.append(f"{name}: the model has no such weight")
                continue
            transposed = stored_transposed(checkpoint.config, name)
            fault = weight_fault(module, info.shape, transposed)
            if fault is None and module.fingerprint is not None and info.dtype in _FLOATS:
                weight = info.read()
                if not module.fingerprint.matches(weight.T if transposed else weight):
                    fault = "its base weight has other values than the one this adapter was trained on"
            if fault:
                faults.append(f"{name}: {fault}")
        refuse_base(self, str(checkpoint.folder), faults)


def head_classes(saved: Mapping[str, Array]) -> int:
    """The outputs of the last layer of a saved head, whatever the order of its layers; 0 where none is saved."""
    layers = [value.shape for name, value in saved.items() if name.endswith("weight") and value.ndim == 2]
    taken = {inputs for _, inputs in layers}
    last = [outputs for outputs, _ in layers if outputs not in taken]
    return int((last or [outputs for outputs, _ in layers] or [0])[-1])


def ordered_classes(id2label: Mapping[Any, Any] | None) -> list[str]:
    """A config's class names in class order, which need not be the order of the file; empty where it has none."""
    return [str(id2label[number]) for number in sorted(id2label, key=int)] if id2label else []


def refuse_base(adapter: Adapter, base: str, faults: Iterable[str]) -> None:
    """Raise one AdapterError for all `faults`; nothing when there are none."""
    faults = list(faults)
    if faults:
        raise AdapterError(
            f"the adapter {adapter.path or ''} does not belong to the model {base} "
            f"({len(faults)} of {len(adapter.modules)} modules do not fit; it was trained on "
            f"{adapter.base_model or 'an unnamed base'}):\n{indented(faults, 20)}"
        )


def stored_transposed(config: dict[str, Any], module: str = "") -> bool:
    """Whether this architecture stores its projections (in, out): GPT-2's Conv1D does, but for its output head."""
    return config.get("model_type") in ("gpt2", "openai-gpt") and not f"{module}.weight".endswith(HEAD)


def base_weight(checkpoint: Checkpoint, module: str) -> npt.NDArray[np.float32]:
    """A module's weight as a float checkpoint holds it, (out_features, in_features), float32.

    Raises:
        CheckpointError: it has none.
    """
    info = checkpoint.weight_of(module)
    if info is None:
        raise CheckpointError(f"{checkpoint.folder}: has no weight for {module}; give the base of the adapter")
    weight = info.read().astype(np.float32)
    return weight.T if stored_transposed(checkpoint.config, module) else weight


def weight_fault(module: AdaptedModule, stored: tuple[int, ...], transposed: bool = False) -> str | None:
    """Why a stored weight of this shape is not the module's, or None."""
    shape = stored[::-1] if transposed else stored
    wanted = (module.out_features, module.in_features)
    return (
        None if shape == wanted else f"the model's weight is {list(shape)}, the adapter's is {list(wanted)} (out, in)"
    )


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def module_entry(shape: BlockShape, mark: Fingerprint | None) -> dict[str, Any]:
    """What adapter_config.json says of one module under `modules`."""
    return {
        "in_features": shape.in_features,
        "out_features": shape.out_features,
        "num_blocks": shape.num_blocks,
        "block_size_in": shape.block_size_in,
        "block_size_out": shape.block_size_out,
        "fingerprint": mark.to_json() if mark else None,
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder; give one with {CONFIG} and {WEIGHTS}")
    try:
        config = read_json(folder / CONFIG)
        if not (folder / WEIGHTS).exists():
            raise AdapterError(f"{folder / WEIGHTS}: missing; an adapter is {CONFIG} and {WEIGHTS}")
        infos, _ = read_header(folder / WEIGHTS)
        strange = [name for name in infos if not name.startswith(PREFIX)]
        if strange:
            raise AdapterError(f"{folder / WEIGHTS}: tensors must be named {PREFIX}…, found {', '.join(strange[:5])}")
        return config, {name.removeprefix(PREFIX): info.read() for name, info in infos.items()}
    except CheckpointError as error:
        raise AdapterError(str(error).replace("a Hugging Face model folder", "an adapter folder")) from error


def _refuse(folder: Path, faults: list[str]) -> None:
    if faults:
        raise AdapterError(f"{folder}: this adapter cannot be used:\n{indented(faults)}")


def _config_faults(config: dict[str, Any]) -> list[str]:
    """Fields that are of another kind than the format says."""
    found = {name: config[name] for name in _KINDS if config.get(name) is not None}
    return [
        f"{CONFIG}: {name} is {json.dumps(value)}; it must be {_KINDS[name][1]}"
        for name, value in found.items()
        if not isinstance(value, _KINDS[name][0])
        or (isinstance(value, list) and not all(isinstance(one, str) for one in value))
    ]


def _modules(config: dict[str, Any], tensors: dict[str, Array]) -> tuple[dict[str, AdaptedModule], list[str]]:
    """The adapted modules, and what is wrong with those that could not be made."""
    listed: dict[str, Any] = config.get("modules") or {}
    stored = {n.removesuffix(SUFFIX): v for n, v in tensors.items() if n.endswith(SUFFIX)}
    faults = [
        f"{name}: listed in {CONFIG}, but {WEIGHTS} has no blocks for it" for name in listed if name not in stored
    ]
    modules: dict[str, AdaptedModule] = {}
    for name, blocks in stored.items():
        entry = listed.get(name)
        if entry is None:
            faults.append(f"{name}: has blocks, but {CONFIG} does not list it")
            continue
        try:
            if not isinstance(entry, dict):
                raise TypeError(f"{CONFIG} has {json.dumps(entry)} for it, and must have an object")
            mark = entry.get("fingerprint")
            module = AdaptedModule(
                name, blocks, int(entry["in_features"]), int(entry["out_features"]),
                Fingerprint.from_json(mark) if mark else None,
            )  # fmt: skip
            said = tuple(int(entry[key]) for key in ("num_blocks", "block_size_in", "block_size_out"))
            if said != module.shape.blocks:
                raise AdapterError(f"{CONFIG} says blocks of shape {said}, {WEIGHTS} holds {blocks.shape}")
            modules[name] = module
        except KeyError as error:
            faults.append(f"{name}: {CONFIG} does not give its {error}")
        except (InputError, TypeError, ValueError) as error:
            faults.append(f"{name}: {error}")
    return modules, faults


def _saved_faults(saved: dict[str, Array], modules_to_save: list[str]) -> list[str]:
    found = {name.rpartition(".")[0] for name in saved}
    faults = [
        f"{name}: under modules_to_save, but {WEIGHTS} does not hold it"
        for name in modules_to_save
        if name not in found
    ]
    return faults + [f"{name}: stored, but not under modules_to_save" for name in found if name not in modules_to_save]
