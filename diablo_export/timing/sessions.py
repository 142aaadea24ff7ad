"""Open everything that `bench` times: the base, the branch with and without kernels, LoRA, a merge; and feed it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export import runtime
from diablo_export.blockdiag import Array
from diablo_export.checkpoint import text_settings
from diablo_export.errors import ExportError, InputError, require
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.opschema import BLOCKS_SUFFIX, SCALES_SUFFIX
from diablo_export.swap import write_adapter
from diablo_export.timing.graphs import with_lora, without_branches

_SILENT = 3  # errors only: each overridable initializer is worth a warning to onnxruntime
_BLOCKS = (BLOCKS_SUFFIX, SCALES_SUFFIX)
_VOCABULARY = 100  # tokens that any model has

# name → what it is; in the order of the tables
VARIANTS = {
    "base": "the graph without branches",
    "base-again": "the same in a second session: what two equal things differ by",
    "branch": "blocks as standard operators, no kernel library",
    "branch-kernels": "blocks in the kernel library",
    "empty": "the branch's graph without adapter, no kernel library",
    "empty-kernels": "the branch's graph without adapter, kernel library",
    "lora": "X·A·B of as many parameters at the same places, set by an .onnx_adapter",
    "empty-lora": "the same graph without adapter: A and B of rank 0",
    "merged": "blocks in the weights",
}


@dataclass(frozen=True)
class Variant:
    """One thing to time: a session, and the adapter that is active in it."""

    session: Any
    adapter: runtime.SwapAdapter | None = None

    def runner(self, folder: Path) -> OnnxRunner:
        """Knows what this session wants to be fed."""
        return OnnxRunner(self.session, adapter=self.adapter, cache_shape=cache_shape(folder))


def open_all(
    out: Path,
    adapter: runtime.SwapAdapter,
    *,
    merged: Path | None,
    threads: int | None,
    provider: str,
    only: Set[str],
    advance: Callable[[float], None] = lambda amount: None,
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Open what there is to time.

    Args:
        out: folder of a branch export.
        adapter: one of its adapters.
        merged: folder of a merge of the same, or None.
        threads: within an operator; None: onnxruntime's choice.
        provider: execution provider.
        only: the names of what is wanted; the base always is.
        advance: told 1 for each session.

    Returns:
        The variants by name, and those of VARIANTS that cannot be had, each with the reason.

    Raises:
        ExportError: onnxruntime refuses the base or the branch. InputError: a provider that is not there.
    """
    file = out / "model.onnx"

    def opened(model: bytes, folder: Path = out, library: Path | None = None) -> Any:
        made = open_model(model, folder, threads=threads, provider=provider, library=library)
        advance(1)
        return made

    base, branch = without_branches(file), file.read_bytes()
    variants: dict[str, Variant] = {}
    skipped: dict[str, str] = {}
    if not only.isdisjoint(("branch", "empty")):
        stock = opened(branch)
        variants |= {"branch": Variant(stock, adapter), "empty": Variant(stock)}
    library = runtime.find_library()
    if library is None:
        skipped |= dict.fromkeys(("branch-kernels", "empty-kernels"), runtime.LIBRARY_HELP.partition(":")[0])
    elif not only.isdisjoint(("branch-kernels", "empty-kernels")):
        kernels = opened(branch, library=library)
        variants |= {"branch-kernels": Variant(kernels, adapter), "empty-kernels": Variant(kernels)}
    if not only.isdisjoint(("lora", "empty-lora")):
        try:
            model, values = with_lora(file, adapter.values())
        except ExportError as error:
            skipped |= dict.fromkeys(("lora", "empty-lora"), str(error))
        else:
            low_rank = opened(model)
            variants |= {"lora": Variant(low_rank, _lora_adapter(values, adapter)), "empty-lora": Variant(low_rank)}
    if merged is None:
        skipped["merged"] = "no --merged; a merge has the graph of the base, whose time stands for it"
    elif "merged" in only:
        variants["merged"] = Variant(opened((merged / "model.onnx").read_bytes(), merged))
    # Sessions opened first can be slower by some percent, as long as they live: where memory is in pieces they get the
    # worst of it. So the base, opened last, is the one that this does not make look slow.
    if "base-again" in only:
        variants["base-again"] = Variant(opened(base))
    variants["base"] = Variant(opened(base))
    return {name: variants[name] for name in VARIANTS if name in variants and name in only}, skipped


def open_model(model: bytes, folder: Path, *, threads: int | None, provider: str, library: Path | None) -> Any:
    """A session of a serialized model whose data file lies in `folder`.

    Raises:
        InputError: this onnxruntime lacks the provider. ExportError: it refuses the model.
    """
    ort = require("onnxruntime", "cpu")
    if provider not in ort.get_available_providers():
        there = ", ".join(ort.get_available_providers())
        raise InputError(f"--provider {provider}: is not in this onnxruntime, which has {there}")
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    # threads spin within a run, as they would in use, and not into the next one's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    try:
        return ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise ExportError(f"{folder}: onnxruntime {ort.__version__} cannot load it: {error}") from error


def prepared(variant: Variant, folder: Path, tokens: int, past: int, seed: int = 0) -> Callable[[], object]:
    """A run of `tokens` tokens behind `past` others, its inputs made already: random tokens, a random KV cache.

    Inputs and outputs stay onnxruntime's own values, as in an application in C++: no copies to numpy are timed.
    """
    ort, random, runner = require("onnxruntime", "cpu"), np.random.default_rng(seed), variant.runner(folder)
    feeds: dict[str, Array] = runner.feeds(random.integers(0, _vocabulary(folder), tokens), past)
    for name, empty in runner.empty_cache().items():
        shape = [size or past for size in empty.shape]  # what a convolution keeps has one size
        feeds[name] = random.normal(0, 0.1, shape).astype(empty.dtype)
    values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
    outputs = [value.name for value in variant.session.get_outputs()]
    options = runtime.run_options(variant.adapter)

    def run() -> object:
        try:
            return variant.session.run_with_ort_values(outputs, values, options)
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise ExportError(f"{folder}: onnxruntime cannot run {tokens} tokens behind {past}: {error}") from error

    return run


def context(folder: Path) -> int | None:
    """How many tokens a model in a folder can take; None where its configuration does not say."""
    given = _config(folder)
    found = given.get("max_position_embeddings") or given.get("n_positions")
    return int(found) if found else None


def parameters(variant: Variant) -> tuple[int, int]:
    """How many numbers its adapter feeds, and their bytes, scales included; without a classifier's head."""
    values = variant.adapter.values() if variant.adapter else {}
    fed = {name: value for name, value in values.items() if name.endswith((*_BLOCKS, ".lora_A", ".lora_B"))}
    count = sum(value.size for name, value in fed.items() if not name.endswith(SCALES_SUFFIX))
    return count, sum(value.nbytes for value in fed.values())


def _lora_adapter(values: Mapping[str, Array], adapter: runtime.SwapAdapter) -> runtime.SwapAdapter:
    """As an adapter file, together with what the other adapter sets beside blocks, such as a classifier's head."""
    rest = {name: value for name, value in adapter.values().items() if not name.endswith(_BLOCKS)}
    # it is mapped: the name may go while it is in use, except on Windows, which clears its temporary files later
    with tempfile.TemporaryDirectory(prefix="diablo-bench-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "lora.onnx_adapter"
        write_adapter(file, {**values, **rest}, adapter.base)
        return replace(runtime.load_adapter(file), kept={**values, **rest})


def _vocabulary(folder: Path) -> int:
    return int(_config(folder).get("vocab_size") or _VOCABULARY)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return text_settings(config)
