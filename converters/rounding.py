"""A word where the type of a model's weights takes blocks away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diablo_export.console import log

_SHOWN = 5
_KEPT = (0.9, 1.1)  # of the blocks, within which nothing is said


def lossy(modules: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a manifest's modules whose blocks rounding changed by a tenth or more."""
    return [module for module in modules if not _KEPT[0] <= module.get("weight_gain", 1.0) <= _KEPT[1]]


def warn_of_rounding(lost: Sequence[Mapping[str, Any]], what: str, way: str) -> None:
    """Name the modules that `lossy` gave, `what` they were rounded to, and another `way`; nothing without any."""
    if lost:
        said = ", ".join(f"{module['name']} keeps {module['weight_gain']:.0%}" for module in lost[:_SHOWN])
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        log.warning("rounding to %s changes the blocks: %s%s; %s", what, said, more, way)
