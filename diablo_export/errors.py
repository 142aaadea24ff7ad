"""Everything this package raises on purpose.

    DiabloError
    ├── InputError              bad input or usage: the command line exits with 2
    │   ├── AdapterError        an adapter folder that cannot be read, or does not fit its base
    │   ├── CheckpointError     a model folder or safetensors file that cannot be read
    │   ├── DataError           a training or evaluation file; names the line
    │   ├── ExportError         a model that this road cannot take; says which road can
    │   ├── MatchError          ONNX nodes that could not be tied to the adapted modules
    │   ├── OutputError         an output folder that exists, is not writable, or has no room
    │   ├── PatchError          a patch that cannot be read, or is for another model
    │   └── DependencyError     a package that an extra would install
    └── CheckFailed             a parity or survival check failed: the command line exits with 1

A message names the file, the value found, what is allowed and what to do.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Sequence
from types import ModuleType


class DiabloError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(DiabloError):
    """Bad input or usage; the command line exits with 2."""


class AdapterError(InputError):
    """An adapter folder that cannot be read, or does not fit its base."""


class CheckpointError(InputError):
    """A model folder or safetensors file that cannot be read."""


class DataError(InputError):
    """A training or evaluation file that cannot be used; the message names the line."""


class ExportError(InputError):
    """A model that the chosen road cannot take; the message says which road can."""


class MatchError(InputError):
    """ONNX nodes that could not be tied to the adapted modules; lists each module and why."""


class OutputError(InputError):
    """An output folder that exists already, is not writable, or has no room."""


class PatchError(InputError):
    """A patch that cannot be read, or is for another model."""


class DependencyError(InputError):
    """A package that is not installed; the message names the extra that installs it."""


class CheckFailed(DiabloError):
    """A parity or survival check failed; the output stays, marked failed."""


def shortened(items: Sequence[str], most: int = 20) -> list[str]:
    """The first of many, and how many more there are."""
    return [*items[:most], *([f"… and {len(items) - most} more"] if len(items) > most else [])]


def indented(items: Iterable[str], most: int | None = None) -> str:
    """A line for each item of a message; only the first `most` of them where that is said."""
    found = list(items)
    return "\n".join(f"  {item}" for item in (found if most is None else shortened(found, most)))


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise DependencyError naming the extra that would install it.

    The root logger stays as it was: onnxruntime's quantizer calls basicConfig() when it is imported, which would print
    this package's messages, and keep the caller's own basicConfig() from doing anything.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"this needs the Python package {module!r}, which cannot be imported here ({error}); "
            f'install it with: pip install "diablo-export[{extra}]"'
        ) from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def require_all(extra: str, *modules: str) -> None:
    """`require` each of these modules, which one extra installs."""
    for module in modules:
        require(module, extra)
