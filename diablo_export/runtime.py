"""Open an exported model in ONNX Runtime, with the kernel library where there is one; adapters are swapped by `swap`.

`SessionOptions.add_initializer` leaves the old value wherever the optimizer has folded the initializer into another
one; `session` replaces values before that.
Needs onnxruntime and numpy alone, except that overriding initializers reads the graph with onnx.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.combine import combine as combine
from diablo_export.console import log
from diablo_export.errors import ExportError, InputError, indented, require
from diablo_export.swap import SwapAdapter as SwapAdapter
from diablo_export.swap import bind as bind
from diablo_export.swap import check_adapter as check_adapter
from diablo_export.swap import check_folder as check_folder
from diablo_export.swap import load_adapter as load_adapter
from diablo_export.swap import run as run
from diablo_export.swap import run_options as run_options
from diablo_export.swap import session_class

if TYPE_CHECKING:
    import onnx
    import onnxruntime

LIBRARY_VARIABLE = "DIABLO_KERNELS"
LIBRARY_HELP = (
    "no kernel library found: not in the environment variable DIABLO_KERNELS, not in kernels/ beside the package's "
    "modules, where pip builds it if there is a C++ compiler, not in kernels/build/ of a checkout. Build it there with:"
    "\n  cmake -S kernels -B kernels/build\n"
    "  cmake --build kernels/build"
)
_LIBRARY_NAMES = {"win32": "diablo_kernels_ort.dll", "darwin": "libdiablo_kernels_ort.dylib"}
_OLDER_LIBRARY = (
    "\nThe kernel library knows the operator, but not with these types: it is older than the model. Build it again, "
    "or set DIABLO_KERNELS=off to run without it"
)
_OFF = "off"  # what the variable says where a library that is there is not wanted
_REGISTERED = "diablo_export.kernels"  # session option that marks a registration: a second one is an error
_FOLDER = "session.model_external_initializers_file_folder_path"  # session option for a model that is no file
_SILENT = 3  # errors only: each overridable initializer is worth a warning to onnxruntime


def find_library() -> Path | None:
    """The library with this machine's kernels for the ai.diablo operators, or None where there is none.

    Looked for in the environment variable DIABLO_KERNELS, then beside the package, then in kernels/build of a
    checkout; nowhere if the variable says `off`. Never in a model's folder: that is data, and a library is a program.
    Without it the operators run as the functions that every exported model carries: same numbers, stock ONNX
    Runtime. LIBRARY_HELP says how to get one.

    Raises:
        InputError: the variable names no file.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if switched_off():
        return None
    if named:
        if not Path(named).is_file():
            raise InputError(
                f"{LIBRARY_VARIABLE}={named}: no such file; unset it, or set it to {_OFF} to run without kernels"
            )
        return Path(named).resolve()
    name = _LIBRARY_NAMES.get(sys.platform, "libdiablo_kernels_ort.so")
    package = Path(__file__).resolve().parent
    places = (package / "kernels" / name, package.parent / "kernels" / "build" / name)
    return next((place for place in places if place.is_file()), None)


def switched_off() -> bool:
    """Whether DIABLO_KERNELS says that no library is wanted, even where there is one."""
    return os.environ.get(LIBRARY_VARIABLE) == _OFF


def why_no_library() -> str:
    """Why `find_library` finds none, in a few words; `diablo-export doctor` says what to do about it."""
    note = Path(__file__).resolve().parent / "kernels" / "not_built.txt"  # left by the build of a pure Python wheel
    if switched_off():
        return f"switched off by {LIBRARY_VARIABLE}={_OFF}"
    if note.is_file():
        return f"not in this wheel: {note.read_text(encoding='utf-8').strip()}"
    return "not built"


def check_library(library: Path) -> None:
    """Load a library, as onnxruntime would.

    Raises:
        InputError: it cannot be loaded, or has no operators to register.
    """
    _entry(library, "RegisterCustomOps")


@functools.cache
def describe_library(library: Path) -> dict[str, Any]:
    """What a kernel library says of itself: `version`, `isa` that it runs with here, `cuda`; empty if it is silent.

    Raises:
        InputError: it cannot be loaded.
    """
    check_library(library)
    try:
        ask = _entry(library, "DiabloDescribe")
    except InputError:  # somebody else's
        return {}
    ask.restype = ctypes.c_char_p
    described: dict[str, Any] = json.loads(ask())
    return described


def _entry(library: Path, name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(str(library)), name)
    except OSError as error:
        why = str(error).removeprefix(f"{library}: ")
        raise InputError(f"{library}: cannot be loaded as a library: {why}; build it again") from error
    except AttributeError as error:
        raise InputError(f"{library}: exports no {name}: not a library of operators for onnxruntime") from error


def register(options: onnxruntime.SessionOptions) -> Path | None:
    """Add the kernel library to session options, once however often it is called; returns the library or None."""
    library = find_library()
    if library is not None and not _is_registered(options):
        options.register_custom_ops_library(str(library))
        options.add_session_config_entry(_REGISTERED, str(library))
    return library


def _register_for(options: onnxruntime.SessionOptions, providers: Sequence[str]) -> None:
    """Register what these providers can use, and say what it is, once a process."""
    library = find_library()
    if library is None:
        return _say_once(f"kernels: none ({why_no_library()}); branches run as standard operators")
    about = describe_library(library)
    elsewhere = [name for name in providers if name != "CPUExecutionProvider"]
    if elsewhere and not (about.get("cuda") and elsewhere == ["CUDAExecutionProvider"]):
        # onnxruntime would move each branch to the CPU and back
        has = "the CPU and CUDA" if about.get("cuda") else "the CPU alone"
        return _say_once(
            f"kernels: {library} is for {has}; on {', '.join(elsewhere)} branches run as standard operators"
        )
    register(options)
    _say_once(f"kernels: {library}, version {about.get('version', 'unknown')}, with {about.get('isa', 'unknown')}")


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)


def session(
    path: str | Path,
    *,
    model: bytes | None = None,
    providers: Sequence[str] | None = None,
    initializers: Mapping[str, Array] | None = None,
    threads: int | None = None,
    spin: bool = True,
) -> onnxruntime.InferenceSession:
    """Open a model file.

    Args:
        path: the .onnx file.
        model: a model in place of the file's; what it keeps in external files is read beside `path` all the same.
        providers: execution providers, best first; None: the CPU.
        initializers: values that replace the model's own for this session, by initializer name, each of the
            same shape and dtype. They replace the values before the graph is optimized. The file is not changed.
        threads: threads within an operator; None: onnxruntime's choice.
        spin: threads that wait for work keep their processor. False where torch or another session takes turns with
            this one: on two cores that makes the turns 2.7 times as fast.

    Raises:
        InputError: no such file; a provider that is not there; an initializer that the model does not have, or
            has with another shape or dtype.
        ExportError: onnxruntime refuses the model.
    """
    ort = require("onnxruntime", "cpu")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such model file")
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = _providers(providers)
    _register_for(options, wanted)
    source, kept = _override(options, Path(path), model, initializers or {})
    try:
        opened = session_class()(source, options, providers=wanted)
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        hint = _OLDER_LIBRARY if "no kernel def matches" in str(error) else ""
        raise ExportError(f"{path}: onnxruntime {ort.__version__} cannot load it: {error}{hint}") from error
    opened.diablo_export_values = kept  # onnxruntime does not own them, and reads them as long as it lives
    return opened


def _is_registered(options: onnxruntime.SessionOptions) -> bool:
    try:
        return bool(options.get_session_config_entry(_REGISTERED))
    except Exception:  # onnxruntime raises its own kind for an absent key
        return False


def _providers(asked: Sequence[str] | None) -> list[str]:
    if asked is None:
        return ["CPUExecutionProvider"]
    available = require("onnxruntime", "cpu").get_available_providers()
    absent = [name for name in asked if name not in available]
    if absent:
        raise InputError(
            f"execution provider {', '.join(absent)} is not in this onnxruntime, which has {', '.join(available)}; "
            'install another build of it, such as: pip install "diablo-export[gpu]"'
        )
    return list(asked)


def _override(
    options: onnxruntime.SessionOptions, path: Path, model: bytes | None, values: Mapping[str, Array]
) -> tuple[str | bytes, list[Any]]:
    """Have `values` replace initializers; returns what to open, and what must stay alive with the session."""
    if model is not None:
        options.add_session_config_entry(_FOLDER, str(path.parent))
    if not values:
        return model or str(path), []
    ort, onnx = require("onnxruntime", "cpu"), require("onnx", "cpu")
    graph = onnx.load_from_string(model) if model else onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    _check_values(path, stored, values)
    external = [name for name in values if stored[name].data_location == onnx.TensorProto.EXTERNAL]
    kept = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values[name])) for name in external]
    if external:
        options.add_external_initializers(external, kept)
    embedded = [name for name in values if name not in external]
    if not embedded:
        return model or str(path), kept
    for name in embedded:  # small ones that lie in the .onnx file itself
        stored[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[name]), name))
    options.add_session_config_entry(_FOLDER, str(path.parent))
    return graph.SerializeToString(), kept


def _check_values(path: Path, stored: Mapping[str, onnx.TensorProto], values: Mapping[str, Array]) -> None:
    helper = require("onnx", "cpu").helper
    faults = []
    for name, value in values.items():
        if name not in stored:
            faults.append(f"{name}: the model has no such initializer")
            continue
        shape, dtype = tuple(stored[name].dims), helper.tensor_dtype_to_np_dtype(stored[name].data_type)
        if shape != value.shape or dtype != value.dtype:
            faults.append(f"{name}: given {value.dtype} {value.shape}, the model's is {dtype} {shape}")
    if faults:
        raise InputError(f"{path}: initializers that cannot be replaced:\n{indented(faults)}")
