"""Open an exported model in ONNX Runtime, with the kernel library where there is one, and swap adapters safely.

ONNX Runtime lets three mistakes pass in silence: an adapter is ignored by a run with I/O binding, it wins over a
block tensor that is fed as well, and `SessionOptions.add_initializer` leaves the old value wherever the
optimizer has folded the initializer into another one. Nothing here can make them.
Needs onnxruntime and numpy alone, except that overriding initializers reads the graph with onnx.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.errors import ExportError, InputError, require

if TYPE_CHECKING:
    import onnx
    import onnxruntime

LIBRARY_VARIABLE = "DIABLO_KERNELS"
LIBRARY_HELP = (
    "no kernel library found: not in the environment variable DIABLO_KERNELS, not in kernels/ beside the package's "
    "modules, not in kernels/build/ of a checkout. Build it with:\n"
    "  cmake -S kernels -B kernels/build\n"
    "  cmake --build kernels/build"
)
_LIBRARY_NAMES = {"win32": "diablo_kernels_ort.dll", "darwin": "libdiablo_kernels_ort.dylib"}
_REGISTERED = "diablo_export.kernels"  # session option that marks a registration: a second one is an error
_SILENT = 3  # errors only: each overridable initializer is worth a warning to onnxruntime


def find_library() -> Path | None:
    """The library with this machine's kernels for the ai.diablo operators, or None where there is none.

    Looked for in the environment variable DIABLO_KERNELS, then beside the package, then in kernels/build of a
    checkout. Without it the operators run as the functions that every exported model carries: same numbers, stock
    ONNX Runtime. LIBRARY_HELP says how to get one.

    Raises:
        InputError: the variable names no file.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise InputError(f"{LIBRARY_VARIABLE}={named}: no such file; unset it to run without kernels")
        return Path(named).resolve()
    name = _LIBRARY_NAMES.get(sys.platform, "libdiablo_kernels_ort.so")
    package = Path(__file__).resolve().parent
    places = (package / "kernels" / name, package.parent / "kernels" / "build" / name)
    return next((place for place in places if place.is_file()), None)


def register(options: onnxruntime.SessionOptions) -> Path | None:
    """Add the kernel library to session options, once however often it is called; returns the library or None."""
    library = find_library()
    if library is not None and not _is_registered(options):
        options.register_custom_ops_library(str(library))
        options.add_session_config_entry(_REGISTERED, str(library))
    return library


def session(
    path: str | Path,
    *,
    providers: Sequence[str] | None = None,
    initializers: Mapping[str, Array] | None = None,
    threads: int | None = None,
    spin: bool = True,
) -> onnxruntime.InferenceSession:
    """Open a model file.

    Args:
        path: the .onnx file.
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
    register(options)
    model, kept = _override(options, Path(path), initializers or {})
    try:
        opened = ort.InferenceSession(model, options, providers=_providers(providers))
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise ExportError(f"{path}: onnxruntime {ort.__version__} cannot load it: {error}") from error
    opened.diablo_export_values = kept  # onnxruntime does not own them, and reads them as long as it lives
    return opened


@dataclass(frozen=True)
class SwapAdapter:
    """An `.onnx_adapter` file, loaded: blocks that a running session can be given."""

    path: Path
    names: frozenset[str]  # of the model inputs that it sets
    handle: Any  # onnxruntime.LoraAdapter

    def values(self) -> dict[str, Array]:
        """Its tensors by input name, copied out of the file."""
        ort = require("onnxruntime", "cpu")
        read = ort.AdapterFormat.read_adapter(str(self.path)).get_parameters()
        return {name: np.array(value.numpy()) for name, value in read.items()}


def load_adapter(path: str | Path) -> SwapAdapter:
    """Load an `.onnx_adapter` file.

    Raises:
        InputError: missing, or not such a file.
    """
    ort = require("onnxruntime", "cpu")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such adapter file; export writes them as adapters/<name>.onnx_adapter")
    handle = ort.LoraAdapter()
    try:
        handle.Load(str(path))
        names = frozenset(ort.AdapterFormat.read_adapter(str(path)).get_parameters())
    except RuntimeError as error:
        raise InputError(f"{path}: not an .onnx_adapter file, or cut short; export it again") from error
    return SwapAdapter(Path(path), names, handle)


def run_options(adapter: SwapAdapter | None) -> onnxruntime.RunOptions | None:
    """Options for `session.run` that make this adapter active; None runs the base.

    They have no effect on `run_with_iobinding`: onnxruntime ignores the adapter there and gives the base's output.
    """
    if adapter is None:
        return None
    options = require("onnxruntime", "cpu").RunOptions()
    options.add_active_adapter(adapter.handle)
    return options


def run(
    opened: onnxruntime.InferenceSession,
    feeds: Mapping[str, Array],
    adapter: SwapAdapter | None = None,
    outputs: Sequence[str] | None = None,
) -> list[Array]:
    """Run a session with an adapter, or as the base; returns the named outputs, or all.

    Raises:
        InputError: the adapter sets inputs that the model does not have, or that are fed as well.
        ExportError: onnxruntime fails on a node, or the feeds do not fit.
    """
    if adapter is not None:
        _check_adapter(opened, feeds, adapter)
    names = list(outputs) if outputs is not None else None
    try:
        results: list[Array] = opened.run(names, dict(feeds), run_options(adapter))
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise ExportError(f"onnxruntime cannot run the model: {error}") from error
    return results


def _check_adapter(opened: onnxruntime.InferenceSession, feeds: Mapping[str, Array], adapter: SwapAdapter) -> None:
    accepted = {value.name for value in [*opened.get_inputs(), *opened.get_overridable_initializers()]}
    foreign, twice = sorted(adapter.names - accepted), sorted(adapter.names & set(feeds))
    if foreign:
        raise InputError(
            f"{adapter.path}: sets {len(foreign)} inputs that this model does not have ({', '.join(foreign[:3])} …); "
            "it was exported for another model, or that model was exported without branches"
        )
    if twice:
        raise InputError(
            f"{adapter.path}: sets inputs that are fed as well ({', '.join(twice[:3])}); leave one of the two out"
        )


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
    options: onnxruntime.SessionOptions, path: Path, values: Mapping[str, Array]
) -> tuple[str | bytes, list[Any]]:
    """Have `values` replace initializers; returns what to open, and what must stay alive with the session."""
    if not values:
        return str(path), []
    ort, onnx = require("onnxruntime", "cpu"), require("onnx", "cpu")
    graph = onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    _check_values(path, stored, values)
    external = [name for name in values if stored[name].data_location == onnx.TensorProto.EXTERNAL]
    kept = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values[name])) for name in external]
    if external:
        options.add_external_initializers(external, kept)
    embedded = [name for name in values if name not in external]
    if not embedded:
        return str(path), kept
    for name in embedded:  # small ones that lie in the .onnx file itself
        stored[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[name]), name))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
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
        raise InputError(f"{path}: initializers that cannot be replaced:\n" + "\n".join(f"  {f}" for f in faults))
