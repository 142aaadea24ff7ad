"""What the config of a PEFT adapter says of it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diablo_export.adapter import CONFIG, TASKS
from diablo_export.checkpoint import read_json
from diablo_export.errors import AdapterError, CheckpointError

_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


@dataclass(frozen=True)
class PeftAdapter:
    """What the config of a PEFT adapter folder says."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """As people call it: LoRA, DoRA, LOHA …."""
        kind = str(self.config["peft_type"])
        return ("DoRA" if self.config.get("use_dora") else "LoRA") if kind == "LORA" else kind

    @property
    def task(self) -> str:
        """`causal-lm` or `text-classification`."""
        return "text-classification" if self.config.get("task_type") == TASKS["text-classification"] else "causal-lm"

    def lossy(self) -> dict[str, dict[str, Any]]:
        """What exporters are known to leave out of such an adapter → the config without it."""
        found: dict[str, dict[str, Any]] = {}
        if self.config.get("use_dora"):
            found["DoRA's magnitudes"] = {"use_dora": False}
        if self.config.get("alpha_pattern"):
            found["alpha_pattern, the strength of single modules"] = {"alpha_pattern": {}}
        if self.config.get("use_rslora"):
            found["the strength of rank-stabilized LoRA"] = {"use_rslora": False}
        return found


def read_config(folder: Path) -> PeftAdapter:
    """The config of an adapter folder.

    Raises:
        AdapterError: no such folder, or a kind that is not weights beside a model's layers.
    """
    try:
        config = read_json(folder / CONFIG)
    except CheckpointError as error:
        raise AdapterError(str(error).replace("a Hugging Face model folder", "an adapter folder")) from error
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind in _PROMPTS:
        raise AdapterError(
            f"{folder / CONFIG}: peft_type is {kind!r}; compared are adapters of a model's layers (LORA, DIABLO …), "
            "not prompts, as these change what goes in"
        )
    return PeftAdapter(folder, config)
