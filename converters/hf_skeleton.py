"""A model of transformers as its config.json describes it, parameters on the meta device: names and shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def skeleton(folder: Path, kind: str, **more: Any) -> Any:
    """The model that the auto class `kind` makes of the folder's config.json.

    Args:
        folder: of a Hugging Face checkpoint.
        kind: an auto class of transformers.
        more: for its `from_config`, such as dtype.

    Raises:
        ImportError, OSError, ValueError, KeyError, TypeError: transformers knows no such model.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(config, **more)
