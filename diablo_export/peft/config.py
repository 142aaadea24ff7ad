"""DiabloConfig: what PEFT is told about a DiaBlo adapter, and the adapter_config.json that both programs read."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from diablo_export.adapter import FORMAT_VERSION
from diablo_export.errors import InputError

# what PEFT's own model classes for these tasks train whole, by the last part of its path
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


class DiabloPeftError(InputError, ValueError):
    """Bad use of DiaBlo through PEFT; also a ValueError, which is what PEFT's callers expect."""


class DiabloType(str, enum.Enum):  # noqa: UP042  # PEFT's is no StrEnum, and prints otherwise
    """The `peft_type`, an enumeration as PEFT's own is: some code asks for its `.value`."""

    DIABLO = "DIABLO"


@dataclass
class DiabloConfig(PeftConfig):
    """Settings of a DiaBlo adapter.

    Attributes:
        num_blocks: how many diagonal blocks each module is cut into; 1/num_blocks of its entries are trained.
        target_modules: names (the end of a module's path), a regular expression for the whole path, or `all-linear`.
            None: q, k, v, up and down projections where the model has all of them, else every linear layer of its
            numbered blocks.
        exclude_modules: names, or a regular expression for the whole path, of modules to leave out.
        layers_to_transform: indices of the layers to adapt; None for all.
        layers_pattern: name of the list of layers, such as `layers`, where the index alone is ambiguous.
        modules_to_save: modules that are trained whole and stored in the adapter, such as a classification head.
        bias: `none`; biases have no place in the adapter format.
        init_weights: True starts from zero blocks, the method's own start. False gives random ones, for tests.
        format_version: of the adapter format.
        labels: class names of a classifier; filled in on saving.
        modules: per module its sizes and the fingerprint of its base weight; filled in on saving. In a loaded config
            it decides which modules are adapted, and a base that does not match it is refused.
        base_quantization: the grid that the base's weights lay on in training, of an adapter of `diablo-export train
            --base-quantize`; kept as it is.
    """

    num_blocks: int = 64
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    format_version: int = FORMAT_VERSION
    labels: list[str] | None = None
    modules: dict[str, Any] | None = field(default=None, repr=False)
    base_quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type: Any = DiabloType.DIABLO
        self._on_save: dict[str, Any] = {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's configs hold them
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self.modules_to_save = _whole_heads(self.modules_to_save, self.task_type)
        faults = list(self._faults())
        if faults:
            raise DiabloPeftError("DiabloConfig: " + "; ".join(faults))

    def _faults(self) -> list[str]:
        faults = []
        count: Any = self.num_blocks
        whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        if not whole and not self.modules:  # an adapter from elsewhere may know only each module's own count
            faults.append(f"num_blocks is {count!r}, it must be a whole number, at least 1")
        if self.bias != "none":
            faults.append(f"bias is {self.bias!r}, only 'none' is possible: the adapter format has no place for biases")
        if self.format_version != FORMAT_VERSION:
            faults.append(
                f"format_version is {self.format_version!r}, this program reads {FORMAT_VERSION}; "
                "use the program version that wrote it"
            )
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            faults.append("layers_to_transform and layers_pattern go with a list of target_modules, not with a string")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    faults.append(f"{name} {pattern!r} is no regular expression ({error})")
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append("layers_pattern is given without layers_to_transform")
        return faults

    def describe(self, **entries: Any) -> None:
        """Keep what only the model knows, for the next save: `modules`, `modules_to_save` and `labels`."""
        self._on_save = {key: value for key, value in entries.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The contents of adapter_config.json."""
        values: dict[str, Any] = {**super().to_dict(), **self._on_save}
        targets = values["target_modules"]
        if isinstance(targets, str) and self._on_save:
            targets = list(values["modules"])  # a regular expression; the format lists names
        for key, names in (("target_modules", targets), ("exclude_modules", values["exclude_modules"])):
            values[key] = sorted(names) if isinstance(names, set) else names
        return values


def _whole_heads(names: list[str] | None, task_type: str | None) -> list[str] | None:
    """`modules_to_save` with the parts of a head, such as classifier.dense, replaced by the head.

    The adapter format lists the modules that own parameters; PEFT adds the heads of a task by name, and must not
    wrap a head and its parts.
    """
    if not names:
        return names
    heads = _HEADS.get(task_type or "", ())
    whole: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        at = next((index for index, part in enumerate(parts) if part in heads), len(parts))
        whole[".".join(parts[: at + 1])] = None
    return list(whole)
