"""Open what was exported, with its adapter on, off, and at scale 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import InputError
from diablo_export.measure.compare import Runner
from diablo_export.measure.exported_base import rebuild
from diablo_export.measure.given_base import foreign, given_base
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.sources import is_branch, is_onnx
from diablo_export.measure.torch_runner import TorchRunner
from diablo_export.opschema import BLOCKS_SUFFIX
from diablo_export.trainer.model import load_base


@dataclass(frozen=True)
class Exported:
    """The runners of one export.

    Attributes:
        on: with the adapter.
        off: the exported base: the branch without blocks, or the merged graph with the base's own weights.
        zero: the branch with blocks of zeros; None for a merge.
        foreign: merged modules that differ from the base where no block reaches; None where that is not looked at.
        provider: what runs it.
        decodes: whether it can decode step by step.
        graph: its ONNX file; None where torch runs it.
        rebuilt: of a merge, the base's weights in its layout, by initializer; rounding them anew takes seconds.
    """

    on: Runner
    off: Runner
    zero: Runner | None
    foreign: list[str] | None
    provider: str
    decodes: bool
    graph: Path | None = None
    rebuilt: Mapping[str, Array] | None = None


def open_exported(
    out: Path,
    manifest: Mapping[str, Any],
    base: TorchRunner,
    name: str,
    adapter: Adapter,
    threads: int | None,
) -> Exported:
    """Open an output folder for one of its adapters.

    Args:
        out: the folder.
        manifest: its manifest.
        base: the base in torch, which is its own exported base where no export changed it.
        name: of the adapter in the manifest.
        adapter: the adapter.
        threads: of onnxruntime.

    Raises:
        ExportError: onnxruntime refuses the model.
        InputError: an adapter file or an initializer that the manifest promises is not there.
    """
    if not is_onnx(out):
        return _torch(out, base, adapter)
    path, shape = out / "model.onnx", cache_shape(out)
    session = runtime.session(path, threads=threads, spin=False)
    provider = session.get_providers()[0]
    if is_branch(manifest):
        on, off, zero = states(manifest, session, out, name, shape)
        return Exported(on, off, zero, None, provider, on.decodes, path)
    on = OnnxRunner(session, cache_shape=shape)
    given = given_base(manifest, adapter)
    if given is not None:
        off = OnnxRunner(runtime.session(given, threads=threads, spin=False), cache_shape=shape)
        outside = foreign(given, path, list(manifest["modules"]), adapter)
        return Exported(on, off, None, outside, provider, on.decodes, path)
    checkpoint = Checkpoint.open(str(base.model.name_or_path))
    rebuilt = rebuild(path, list(manifest["modules"]), checkpoint, adapter)
    if not rebuilt.initializers:
        raise InputError(f"{out}: the manifest lists no merged weights; make the folder again")
    off = OnnxRunner(
        runtime.session(path, initializers=rebuilt.initializers, threads=threads, spin=False), cache_shape=shape
    )
    return Exported(on, off, None, rebuilt.foreign, provider, on.decodes, path, rebuilt.initializers)


def states(
    manifest: Mapping[str, Any], session: Any, out: Path, name: str, shape: tuple[int, int] | None
) -> tuple[OnnxRunner, OnnxRunner, OnnxRunner]:
    """A branch export in a session of its graph: with the adapter, without blocks, and with blocks of zeros."""
    return (_web if manifest.get("for") == "web" else _branch)(session, out, name, shape)


def _branch(
    session: Any, out: Path, name: str, shape: tuple[int, int] | None
) -> tuple[OnnxRunner, OnnxRunner, OnnxRunner]:
    swap = runtime.load_adapter(out / "adapters" / f"{name}.onnx_adapter")
    head, zeros = _head_and_zeros(swap.values())
    return (
        OnnxRunner(session, adapter=swap, cache_shape=shape),
        OnnxRunner(session, fixed=head, cache_shape=shape),
        OnnxRunner(session, fixed=head | zeros, cache_shape=shape),
    )


def _web(
    session: Any, out: Path, name: str, shape: tuple[int, int] | None
) -> tuple[OnnxRunner, OnnxRunner, OnnxRunner]:
    """The same of an export whose blocks are plain inputs, fed as its reader in JavaScript feeds them."""
    values, none = (_safetensors(out / "adapters" / f"{each}.safetensors") for each in (name, "base"))
    head, zeros = _head_and_zeros(values)
    return (
        OnnxRunner(session, fixed=values, cache_shape=shape),
        OnnxRunner(session, fixed=none | head, cache_shape=shape),
        OnnxRunner(session, fixed=head | zeros, cache_shape=shape),
    )


def _head_and_zeros(values: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What an adapter brings beside its blocks, and zeros in place of the blocks.

    A classifier's head stays with the adapter off: only the blocks are switched, as in torch.
    """
    head = {key: value for key, value in values.items() if not key.endswith(BLOCKS_SUFFIX)}
    return head, {key: np.zeros_like(value) for key, value in values.items() if key.endswith(BLOCKS_SUFFIX)}


def _safetensors(file: Path) -> dict[str, Array]:
    try:
        values: dict[str, Array] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); export the folder again") from error
    return values


def _torch(out: Path, base: TorchRunner, adapter: Adapter) -> Exported:
    model, _ = load_base(out, adapter.task)
    # nothing but the blocks was written into these weights, so the base is its own exported base
    return Exported(TorchRunner(model), base, None, None, "torch", not adapter.classifies)
