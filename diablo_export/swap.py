"""Hot swap: `.onnx_adapter` files loaded, checked against the model, and made active in a session, one run at a time.

ONNX Runtime lets these mistakes pass in silence: an adapter is ignored by a run with I/O binding, it wins over a block
tensor that is fed as well, of two that set the same input one wins, and one for another base of the same sizes runs.
Here each of them is an error. Needs onnxruntime and numpy alone.
"""

from __future__ import annotations

import functools
import json
import os
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diablo_export.block_storage import BASE_KEY, MARKED, base_mark
from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.errors import ExportError, InputError, require
from diablo_export.output import MANIFEST

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True, eq=False)
class SwapAdapter:
    """An `.onnx_adapter` file, loaded: blocks that a running session can be given. Compared by identity.

    Attributes:
        path: the file; of a sum, what was summed.
        types: element type of each model input that it sets, as onnxruntime spells it: tensor(float).
        handle: an onnxruntime.LoraAdapter.
        base: `block_storage.base_mark` of the base that it was made for, None where the file does not say.
        kept: the values of a sum, which has no file.
    """

    path: Path
    types: Mapping[str, str]
    handle: Any
    base: int | None = None
    kept: Mapping[str, Array] | None = None
    _on_device: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The model inputs that it sets."""
        return frozenset(self.types)

    def values(self) -> dict[str, Array]:
        """Its tensors by input name, copied out of the file."""
        if self.kept is not None:
            return {name: value.copy() for name, value in self.kept.items()}
        ort = require("onnxruntime", "cpu")
        read = ort.AdapterFormat.read_adapter(str(self.path))
        return {name: np.array(value.numpy()) for name, value in read.get_parameters().items()}

    def on_device(self, device: str = "cpu", device_id: int = 0) -> dict[str, onnxruntime.OrtValue]:
        """Its tensors on a device, put there at the first call and kept for as long as the adapter."""
        if (device, device_id) not in self._on_device:
            make = require("onnxruntime", "cpu").OrtValue.ortvalue_from_numpy
            self._on_device[device, device_id] = {n: make(v, device, device_id) for n, v in self.values().items()}
        return self._on_device[device, device_id]

    def save(self, file: str | Path) -> None:
        """Write it as an .onnx_adapter file: a sum, for onnxruntime-genai and the next start."""
        write_adapter(Path(file), self.values(), self.base)


Adapters = SwapAdapter | Sequence[SwapAdapter] | None


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
        read = ort.AdapterFormat.read_adapter(str(path))
        types = {name: value.data_type() for name, value in read.get_parameters().items()}
    except RuntimeError as error:
        raise InputError(f"{path}: not an .onnx_adapter file, or cut short; export it again") from error
    base = read.get_model_version() if read.get_adapter_version() == MARKED else None
    return SwapAdapter(Path(path), types, handle, base)


def write_adapter(file: Path, parameters: Mapping[str, Array], base: int | None) -> None:
    """Write `parameters` as an .onnx_adapter file that carries the mark of its base, where that is known.

    Written beside and renamed: onnxruntime maps loaded adapters into memory, so that a session that runs with the old
    file would read the new bytes, or end the process where the new file is shorter.
    """
    ort = require("onnxruntime", "cpu")
    partial = file.with_name(f".{file.name}.partial")
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1 if base is None else MARKED)
    adapter.set_model_version(1 if base is None else base)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()})
    try:
        adapter.export_adapter(str(partial))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def check_adapter(opened: onnxruntime.InferenceSession, adapter: SwapAdapter) -> None:
    """Check an adapter against a session, once: `run` and `bind` do so themselves.

    Whoever calls `session.run` with `run_options(adapter)` calls this before. An adapter or a model that does not say
    which base it was made from is let through with a warning.

    Raises:
        InputError: it was made for another base, even if every name and size fits; it sets inputs that the model
            does not have, or has in another type.
    """
    checked = opened.__dict__.setdefault("diablo_export_checked", weakref.WeakSet())
    if adapter in checked:
        return
    takes = {value.name: value.type for value in [*opened.get_inputs(), *opened.get_overridable_initializers()]}
    foreign = sorted(adapter.names - takes.keys())
    if foreign:
        raise InputError(
            f"{adapter.path}: sets {len(foreign)} inputs that this model does not have ({', '.join(foreign[:3])} …); "
            "it was exported for another model, or that model was exported without branches"
        )
    _check_base(opened.get_modelmeta().custom_metadata_map.get(BASE_KEY), adapter)
    other = next((name for name, kind in sorted(adapter.types.items()) if kind != takes[name]), None)
    if other is not None:
        raise InputError(
            f"{adapter.path}: {other} is a {adapter.types[other]}, the model takes a {takes[other]}; export the "
            "adapter with the model's own --precision and --block-dtype"
        )
    checked.add(adapter)


def check_folder(folder: str | Path, adapter: SwapAdapter) -> None:
    """Check an adapter's base against an export folder's manifest, for runtimes that open the folder themselves.

    onnxruntime-genai loads any adapter whose names fit: call this before `Adapters.load`.

    Raises:
        InputError: it was made for another base; the folder has no manifest.
    """
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give a folder that export has made") from error
    _check_base(manifest.get(BASE_KEY), adapter)


def _check_base(said: str | None, adapter: SwapAdapter) -> None:
    if adapter.base is None or said is None:
        what = f"{adapter.path} does" if adapter.base is None else "the model does"
        log.warning("%s not say which base it was made for: that it fits this one is not checked", what)
    elif adapter.base != base_mark(said):
        raise InputError(
            f"{adapter.path}: was made for another base (mark {adapter.base:08x}) than this model "
            f"({base_mark(said):08x}); its blocks mean nothing here, even if they fit. Use it with the model that it "
            "was exported with, or train one for this base"
        )


def run_options(adapter: Adapters) -> onnxruntime.RunOptions | None:
    """Options for `session.run` that make this adapter active, or several; None runs the base.

    They are for `run` alone: with `run_with_iobinding` onnxruntime would ignore the adapter, which sessions of
    this package refuse; see `bind`.

    Raises:
        InputError: two adapters that set the same input.
    """
    several = _several(adapter)
    if not several:
        return None
    options = _classes()[1]()
    options.adapters = several  # onnxruntime's do not keep them: once they are gone a run gives the base, silently
    for one in several:
        options.add_active_adapter(one.handle)
    return options


def run(
    opened: onnxruntime.InferenceSession,
    feeds: Mapping[str, Array],
    adapter: Adapters = None,
    outputs: Sequence[str] | None = None,
) -> list[Array]:
    """Run a session with an adapter, or as the base; returns the named outputs, or all.

    Several adapters may be active where no two set the same input; `combine` adds up those that do.

    Raises:
        InputError: an adapter for another base or model, inputs that are fed as well or set twice.
        ExportError: onnxruntime fails on a node, or the feeds do not fit.
    """
    options = run_options(adapter)
    _check(opened, feeds, adapter)
    names = list(outputs) if outputs is not None else None
    try:
        results: list[Array] = opened.run(names, dict(feeds), options)
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise ExportError(f"onnxruntime cannot run the model: {error}") from error
    return results


def bind(
    opened: onnxruntime.InferenceSession,
    feeds: Mapping[str, Array | onnxruntime.OrtValue],
    adapter: Adapters = None,
    outputs: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    device_id: int = 0,
) -> onnxruntime.IOBinding:
    """An I/O binding with the adapter's blocks bound as inputs, for `session.run_with_iobinding(binding)`.

    Other inputs can be bound anew between runs; another adapter, or the base, takes another binding. Binding an
    adapter to a device puts it there once; the adapter keeps it.

    Args:
        opened: the session.
        feeds: inputs, as arrays or as tensors that are on the device already.
        adapter: None: the base.
        outputs: names; None: all. They are allocated on the device.
        device: cpu or cuda.
        device_id: which of them.

    Raises:
        InputError: as `run`.
    """
    make = require("onnxruntime", "cpu").OrtValue.ortvalue_from_numpy
    _check(opened, feeds, adapter)
    given = {n: make(np.ascontiguousarray(v), device, device_id) if isinstance(v, np.ndarray) else v
             for n, v in feeds.items()}  # fmt: skip
    for one in _several(adapter):
        given |= one.on_device(device, device_id)
    binding = opened.io_binding()
    for name, value in given.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs if outputs is not None else [value.name for value in opened.get_outputs()]:
        binding.bind_output(name, device, device_id)
    binding.diablo_export_values = given  # the binding does not own them
    return binding


def _several(adapter: Adapters) -> list[SwapAdapter]:
    """The adapters one by one; an error where two set the same input."""
    if adapter is None:
        return []
    several = [adapter] if isinstance(adapter, SwapAdapter) else list(adapter)
    if len(several) > 1:
        counts = Counter(name for one in several for name in one.names)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise InputError(
                f"{', '.join(str(one.path) for one in several)}: {len(twice)} inputs are set by more than one of them "
                f"({', '.join(twice[:3])} …); give one at a time, or their sum: runtime.combine([…])"
            )
    return several


def _check(opened: onnxruntime.InferenceSession, feeds: Mapping[str, Any], adapter: Adapters) -> None:
    for one in _several(adapter):
        check_adapter(opened, one)
        if not one.names.isdisjoint(feeds):
            twice = sorted(one.names & feeds.keys())
            raise InputError(
                f"{one.path}: sets inputs that are fed as well ({', '.join(twice[:3])}); leave one of the two out"
            )


def session_class() -> Any:
    """onnxruntime.InferenceSession, but one that does not ignore an adapter in `run_with_iobinding`."""
    return _classes()[0]


@functools.cache
def _classes() -> tuple[Any, Any]:
    """The session class and the options that it knows as ones with an adapter; onnxruntime is loaded on first use."""
    ort = require("onnxruntime", "cpu")

    class AdapterOptions(ort.RunOptions):  # type: ignore[misc, name-defined]
        """Run options with an adapter."""

    class Session(ort.InferenceSession):  # type: ignore[misc, name-defined]
        """A session whose runs with I/O binding refuse options with an adapter."""

        def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
            if isinstance(run_options, AdapterOptions):
                raise InputError(
                    "onnxruntime ignores the adapters of run options in run_with_iobinding and would give the base's "
                    "output; bind the adapter: session.run_with_iobinding(runtime.bind(session, feeds, adapter))"
                )
            super().run_with_iobinding(iobinding, run_options)

    return Session, AdapterOptions
