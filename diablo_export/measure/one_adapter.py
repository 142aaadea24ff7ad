"""Everything that parity measures about one adapter in an output folder."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.console import log, progress
from diablo_export.errors import ExportError
from diablo_export.manifest import versions
from diablo_export.measure import compare, foreign_graph, padding, sources
from diablo_export.measure.exported import Exported, open_exported
from diablo_export.measure.golden import Golden, record
from diablo_export.measure.metrics import Comparison
from diablo_export.measure.modules import look
from diablo_export.measure.onnx_runner import OnnxRunner
from diablo_export.measure.prompts import Ids, Sample, collect, digest
from diablo_export.measure.texts import answers, continuations
from diablo_export.measure.torch_runner import TorchRunner, context_length
from diablo_export.trainer.model import load_tuned, vocabulary_size
from diablo_export.trainer.packed_layer import holds_packed

# a centred logit that moves by less than float32 kernels differ among themselves has not moved
ALIVE = 1e-4
_WINDOW = 512  # tokens of a sequence, at most
_LOGITS_AT_ONCE = 1 << 24  # of one model: 64 MB in float32; a larger vocabulary gets shorter sequences
_SHORTEST = 64
LOST = 0.05  # of the adapter's effect on the logits: then the share of it in each module's weights is looked at
_UNSURE = 0.025  # a gain whose standard error is larger is no better known for that: an export may be all noise
_GOLDEN = 4  # texts of a classifier that a certificate keeps
_GOLDEN_STEPS = 4  # tokens decoded after each of a certificate's prompts


@dataclass
class Measured:
    """What was found about one adapter.

    Attributes:
        name: of the adapter in the manifest.
        classifier: whether the model is one.
        figures: everything that can be limited, by the names of `limits.FIGURES`.
        parts: the report's logits, kl, top1_agreement, perplexity, decode, accuracy and adapter.
        errors: standard errors of figures that are differences of shares.
        environment: the report's environment.
        samples: what was compared.
        graph: of another program's export, how a certificate has it run.
        golden: rows for a certificate, where asked for: of the adapter, and of the base where it can be left out.
    """

    name: str
    classifier: bool
    environment: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    graph: dict[str, Any] = field(default_factory=dict)
    golden: list[Golden] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def measure(
    out: Path,
    manifest: Mapping[str, Any],
    base: Path,
    name: str,
    folder: Path,
    *,
    threads: int | None,
    modules: bool = False,
    **bounds: Any,
) -> Measured:
    """Compare an output folder with base + adapter in torch; see `parity` for the arguments, `bounds` are `examine`'s.

    A model that onnxruntime refuses to load or run is a finding (figure `runs` is 0), not an error.

    Raises:
        InputError: the base, the adapter or the data cannot be used.
    """
    adapter = Adapter.load(folder)
    log.info("parity: %s against %s with the adapter %s in torch", out, base, folder)
    model, tokenizer = load_tuned(base, adapter)
    tuned, off = TorchRunner(model), TorchRunner(model, adapted=False)
    found = Measured(name, adapter.classifies, environment(manifest, base, name))
    found.environment["precision"] = sources.precision(out, manifest)
    bounds |= {"threads": threads, "labels": adapter.labels}
    if manifest.get("exporter") == "given":  # whoever exported it may have fixed the length of its sequences
        bounds["longest"] = foreign_graph.read(out / "model.onnx").length

    opened: list[Exported] = []

    def open_it() -> Exported:
        opened.append(open_exported(out, manifest, off, name, adapter, threads))
        return opened[0]

    examine(found, tuned, off, tokenizer, open_it, **bounds)
    if modules and holds_packed(model):
        log.warning("modules are not looked into where the base is a quantized checkpoint; logits were compared")
    elif modules and found.figures["runs"]:
        _add_modules(found, out, manifest, model, adapter, opened.pop().rebuilt, threads)
    return found


def _add_modules(
    found: Measured,
    out: Path,
    manifest: Mapping[str, Any],
    model: Any,
    adapter: Adapter,
    rebuilt: Mapping[str, Array] | None,
    threads: int | None,
) -> None:
    """Look into modules, now that the sessions of the whole comparison are closed: memory is for one kind at a time."""
    lost = not found.figures["adapter.survival_gain.error"] <= LOST
    try:
        looked = look(
            out, manifest, model, found.name, adapter, found.samples, rebuilt=rebuilt, threads=threads, lost=lost
        )
    except ExportError as error:  # a graph that runs, but not with its inner values shown
        log.warning("modules cannot be looked into: %s", error)
        return
    found.parts |= {"modules": looked.rows, "first_divergent_module": looked.first}
    found.figures["modules.faulty"] = looked.faulty


def examine(
    found: Measured,
    tuned: TorchRunner,
    off: TorchRunner,
    tokenizer: Any,
    opened: Callable[[], Exported],
    *,
    labels: Sequence[str | int],
    data: str | Path | None,
    samples: int | None,
    max_tokens: int,
    seed: int,
    steps: int,
    threads: int | None,
    certify: bool = False,
    longest: int | None = None,
) -> Measured:
    """Compare tuned and its base with what `opened` opens, and put all figures into `found`.

    Args:
        found: to be filled.
        tuned: the reference.
        off: its base.
        tokenizer: theirs.
        opened: opens the export; its ExportError is a finding.
        labels: class names of a classifier, in class order; empty: numbers.
        data, samples, max_tokens, seed, steps, threads, certify: as of `parity`.
        longest: sequence that the export takes, where that is bounded.

    Raises:
        InputError: the data cannot be used.
    """
    bounds: dict[str, Any] = {"data": data, "samples": samples, "max_tokens": max_tokens, "seed": seed}
    longest = min(window(tuned.model), longest or _WINDOW)
    items = collect(tokenizer, window=longest, classifier=found.classifier, **bounds)
    found.samples, tokens = items, sum(len(item.ids) for item in items)
    found.environment |= bounds | {
        "data": str(data or "built-in prompts"),
        "sequences": len(items),
        "tokens": tokens,
        "samples_xxh3": digest(items),
        "threads": threads or torch.get_num_threads(),
    }
    try:
        exported = opened()
        found.environment["provider"] = exported.provider
        if exported.provider != "torch":
            found.environment["kernels"] = str(runtime.find_library() or "") or None
        with progress("Comparing", tokens) as advance:
            sums, choices = compare.prefill(compare.Four(tuned, off, exported.on, exported.off), items, advance)
        _add_logits(found, sums)
        found.parts["distribution"]["by_length"] = sums.by_length([len(item.ids) for item in items])
        _add_adapter(found, sums, exported, items[0])
        _add_padding(found, padding.compare(tuned, exported.on, items, exported.graph, classifier=found.classifier))
        if found.classifier:
            classes = list(labels) or list(range(tuned.prefill(items[0].ids).shape[-1]))
            _add_accuracy(found, compare.accuracy(choices, items, classes), choices)
            found.parts["texts"] = answers(found.name, tokenizer, items, choices, [str(label) for label in classes])
        elif exported.decodes:
            prompts = compare.decoding_prompts(items, tokenizer.eos_token_id, context_length(tuned.model), steps)
            with progress("Decoding", len(prompts)) as advance:
                decoded = compare.decode(tuned, exported.on, prompts, steps, advance)
            _add_decode(found, decoded)
            found.parts["texts"] = continuations(found.name, tokenizer, off, exported.on, prompts, decoded.texts)
        if certify:
            found.golden = _golden(found.name, tuned, off, exported, items, tokenizer.eos_token_id)
        found.figures["runs"] = 1
    except ExportError as error:
        found.environment["fault"] = str(error)
        found.figures, found.parts = {"runs": 0}, {}
    return found


def _golden(
    name: str, tuned: TorchRunner, off: TorchRunner, exported: Exported, items: Sequence[Sample], eos: int | None
) -> list[Golden]:
    """A few inputs with what the export gives for them now, adapter on, and off where the graph can run without."""
    assert isinstance(exported.on, OnnxRunner)
    states: list[tuple[str | None, TorchRunner, OnnxRunner]] = [(name, tuned, exported.on)]
    if exported.zero is not None:
        states.append((None, off, OnnxRunner(exported.on.session, cache_shape=exported.on.cache_shape)))
    nothing = np.zeros(0, np.int64)
    if not exported.decodes:
        return [
            record(state, item.ids, nothing, torch_runner.prefill(item.ids), runner.prefill(item.ids))
            for item in items[:_GOLDEN]
            for state, torch_runner, runner in states
        ]
    cases = []
    for prompt in compare.decoding_prompts(items, eos, context_length(tuned.model), _GOLDEN_STEPS):
        tokens, _ = tuned.greedy(prompt, _GOLDEN_STEPS)
        for state, torch_runner, runner in states:
            wanted, certified = torch_runner.decode(prompt, tokens), runner.decode(prompt, tokens)
            cases.append(record(state, prompt, tokens, wanted, certified))
    return cases


@contextlib.contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Have torch compute with so many threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def window(model: Any) -> int:
    """Tokens of a sequence, at most: what the model takes, and what leaves room for its logits."""
    fitting = max(_SHORTEST, _LOGITS_AT_ONCE // vocabulary_size(model))
    return min(_WINDOW, fitting, context_length(model))


def environment(manifest: Mapping[str, Any], base: Path, name: str) -> dict[str, Any]:
    """What a report says of where and with what it was measured."""
    return {
        "versions": versions(),
        "exported_with": manifest.get("versions"),
        "cpus": os.cpu_count(),
        "provider": None,
        "kernels": None,
        "base": str(base),
        "adapter": name,
    }


def _add_logits(found: Measured, sums: Comparison) -> None:
    logits, kl, perplexity = sums.logits(), sums.divergence(), sums.perplexity()
    found.parts |= {"logits": logits, "kl": kl, "top1_agreement": sums.agreement}
    found.figures |= {f"logits.{key}": value for key, value in logits.items()}
    found.figures |= {f"kl.{key}": value for key, value in kl.items()}
    found.figures["top1_agreement"] = sums.agreement
    found.figures["top1_agreement.drop"] = sums.base_agreement - sums.agreement
    shares = (sums.agreement, sums.base_agreement)
    found.errors["top1_agreement.drop"] = math.sqrt(sum(p * (1 - p) for p in shares) / sums.positions)
    found.figures["kl.ratio"] = _over(kl["mean"], sums.base_kl)
    found.figures["kl.share"] = _over(kl["mean"], sums.wanted_kl)
    found.parts["distribution"] = distribution = sums.distribution()
    found.figures["kl.median"] = distribution["kl_median"]
    found.figures["top5_agreement"] = distribution["top5_agreement"]
    found.figures["delta_p.rms"] = distribution["delta_p"]["rms"]
    if not found.classifier:
        found.parts["perplexity"] = perplexity
        distribution["perplexity_error"] = sums.perplexity_error()
    if perplexity:
        found.figures["perplexity.ratio"] = perplexity["exported"] / perplexity["tuned"]


def _over(part: float, whole: float) -> float:
    """part / whole, where nothing over nothing is 0."""
    return part / whole if whole > 0 else math.inf if part else 0.0


def _add_adapter(found: Measured, sums: Comparison, exported: Exported, sample: Sample) -> None:
    gain, cosine = sums.survival()
    # at scale 0 the branch must be the base bit for bit; a merge has no scale, its base is rebuilt beside it
    silent = exported.zero is None or np.array_equal(
        exported.zero.prefill(sample.ids), exported.off.prefill(sample.ids)
    )
    alive = bool(silent and sums.largest_wanted > ALIVE and sums.largest_effect > ALIVE)
    found.parts["adapter"] = {"alive": alive, "survival_gain": gain, "survival_cosine": cosine}
    found.figures |= {"adapter.alive": float(alive), "adapter.survival_gain": gain}
    found.figures |= {"adapter.survival_gain.error": abs(gain - 1), "adapter.survival_cosine": cosine}
    found.errors["adapter.survival_gain.error"] = float(np.nan_to_num(min(sums.survival_error(), _UNSURE)))
    if isinstance(exported.on, OnnxRunner) and exported.on.adapter is not None:
        found.figures["adapter.bound"] = float(_binds(exported.on, sample.ids))
    if exported.foreign is not None:
        found.figures["untouched"] = len(exported.foreign)
        for module in exported.foreign:
            log.warning("%s differs from the base also where no block reaches", module)


def _binds(runner: OnnxRunner, ids: Ids) -> bool:
    """Whether an I/O binding gives what a plain run gives: onnxruntime by itself forgets adapters there."""
    feeds = {**runner.feeds(ids, 0), **runner.empty_cache(), **runner.fixed}
    binding = runtime.bind(runner.session, feeds, runner.adapter, [runner.output])
    runner.session.run_with_iobinding(binding)
    (logits,) = binding.copy_outputs_to_cpu()
    found = logits.astype(np.float32).reshape(-1, logits.shape[-1])
    return bool(np.abs(found - runner.prefill(ids)).max() <= ALIVE)


def _add_padding(found: Measured, moved: dict[str, Any] | None) -> None:
    found.parts["distribution"]["padding"] = moved
    for side in ("right", "left"):
        if moved and moved[side] is not None:
            found.figures[f"padding.{side}"] = moved[side]


def _add_accuracy(found: Measured, accuracy: dict[str, float] | None, choices: dict[str, list[int]]) -> None:
    found.parts["accuracy"] = accuracy
    if accuracy:
        other = sum(a != b for a, b in zip(choices["tuned"], choices["exported"], strict=True))
        # only where the two differ can one be right and the other not: each such sample counts ±1
        found.errors["accuracy.drop"] = math.sqrt(other) / len(choices["tuned"])
        found.figures["accuracy.drop"] = accuracy["tuned"] - accuracy["exported"]


def _add_decode(found: Measured, decoded: compare.Decoded) -> None:
    found.parts["decode"] = {
        "steps": decoded.steps,
        "first_divergence": decoded.first_divergence,
        "max_abs": decoded.max_abs,
    }
    found.figures |= {"decode.max_abs": decoded.max_abs, "decode.cache": decoded.cache}
    found.figures["decode.diverged"] = decoded.diverged
