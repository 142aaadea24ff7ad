"""diablo-export: train DiaBlo blocks, merge them into int4, export them as ONNX branches, prove that they survived.

One function per command, with the same names as its options; `patch` is a module with a function per subcommand.
Importing this loads neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# verb → the module that holds it; loaded on first use
_VERBS = {
    "bench": "diablo_export.timing.bench",
    "convert": "diablo_export.converters.diablo_chkpt",
    "demo": "diablo_export.converters.demo",
    "doctor": "diablo_export.diagnosis",
    "export": "diablo_export.converters.export",
    "inspect": "diablo_export.converters.inspection",
    "merge": "diablo_export.converters.merge",
    "parity": "diablo_export.measure.parity",
    "patch": "diablo_export.patch",
    "quantize": "diablo_export.converters.quantize",
    "sweep": "diablo_export.trainer.sweep",
    "train": "diablo_export.trainer.train",
    "verify": "diablo_export.measure.verify",
}

if TYPE_CHECKING:
    from diablo_export import patch as patch
    from diablo_export.converters.demo import demo as demo
    from diablo_export.converters.diablo_chkpt import convert as convert
    from diablo_export.converters.export import export as export
    from diablo_export.converters.inspection import inspect as inspect
    from diablo_export.converters.merge import merge as merge
    from diablo_export.converters.quantize import quantize as quantize
    from diablo_export.diagnosis import doctor as doctor
    from diablo_export.measure.parity import parity as parity
    from diablo_export.measure.verify import verify as verify
    from diablo_export.timing.bench import bench as bench
    from diablo_export.trainer.sweep import sweep as sweep
    from diablo_export.trainer.train import train as train

__all__ = [
    "__version__", "bench", "convert", "demo", "doctor", "export", "inspect", "merge", "parity", "patch", "quantize",
    "sweep", "train", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        module = importlib.import_module(_VERBS[name])
        return getattr(module, name, module)
    raise AttributeError(f"module 'diablo_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
