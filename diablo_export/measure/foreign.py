"""Exports of other programs: judged against a torch model with a PEFT or DiaBlo adapter, without a manifest.

What a manifest would say is found out by `foreign_sources`; then everything that parity measures is measured, except
what needs to know which weight went where. The exported base is another export, given as `exported_base`; else the
graph with its `.onnx_adapter` at zero; else the base in torch, where a quantized export's rounding counts as effect.
Loss that exporters are known for is looked for by name: an adapter that was left out, or a part of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.console import log
from diablo_export.errors import ExportError
from diablo_export.measure import foreign_graph, foreign_modules, peft_config, peft_tuned
from diablo_export.measure.exported import Exported
from diablo_export.measure.foreign_graph import Graph
from diablo_export.measure.foreign_sources import adapter_file
from diablo_export.measure.metrics import centred
from diablo_export.measure.one_adapter import LOST, Measured, environment, examine
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.peft_config import PeftAdapter
from diablo_export.measure.prompts import Sample
from diablo_export.measure.torch_runner import TorchRunner
from diablo_export.trainer.model import load_tuned

# squared distance to what an export is, over that to what it should be: float exports are below 1e-6, int4 above
_SAME = 0.05
_LOOKED_AT = 512  # tokens that tell a lossy adapter from the whole one


def measure(
    found: Mapping[str, Any],
    base: Path,
    name: str,
    folder: Path,
    *,
    exported_base: str | Path | None,
    threads: int | None,
    modules: bool = False,
    **bounds: Any,
) -> Measured:
    """Compare another program's export with base + adapter in torch; `bounds` are those of `examine`.

    Raises:
        InputError: the base, the adapter, the data or the exported base cannot be used.
    """
    adapter = peft_config.read_config(folder)
    graph = foreign_graph.read(Path(found["foreign"]))
    other = foreign_graph.read(foreign_graph.find(Path(exported_base))) if exported_base is not None else None
    log.info("parity: %s against %s with the %s adapter %s in torch", graph.file, base, adapter.kind, folder)
    tuned, off, tokenizer, labels = _torch(base, adapter)
    measured = Measured(name, adapter.task == "text-classification", environment(found, base, name))
    measured.environment |= {"precision": graph.precision, "made_by": "another program", "adapter_kind": adapter.kind}
    opened: list[Exported] = []

    def open_both() -> Exported:
        opened.append(_open(graph, other, off, name, threads, classifier=measured.classifier))
        return opened[0]

    bounds |= {"labels": labels, "longest": graph.length, "threads": threads}
    measured = examine(measured, tuned, off, tokenizer, open_both, **bounds)
    if measured.figures["runs"]:
        measured.graph = _as_run(Path(found["folder"]), graph, opened[0], name)
        in_torch = opened[0].off is off
        measured.environment["exported_base"] = "torch" if in_torch else str(other.file if other else graph.file)
        if in_torch:  # these compare with a base that the export had no part in
            for figure in ("kl.ratio", "top1_agreement.drop"):
                measured.figures.pop(figure)
            measured.errors.pop("adapter.survival_gain.error")  # noise has been counted already
        _look_for_loss(measured, base, adapter, opened[0], tuned, off)
        if modules:
            _add_modules(measured, graph, other, opened.pop(), tuned, off, threads)
    return measured


def _add_modules(
    measured: Measured,
    graph: Graph,
    other: Graph | None,
    exported: Exported,
    tuned: TorchRunner,
    base: TorchRunner,
    threads: int | None,
) -> None:
    """Look into the modules that can be found, now that the sessions of the whole comparison are done with."""
    lost = not measured.figures["adapter.survival_gain.error"] <= LOST
    closed: dict[str, Any] = {"session": None}  # memory is for one kind of session at a time
    on, off = (
        dataclasses.replace(each, **closed) if isinstance(each, OnnxRunner) else each
        for each in (exported.on, exported.off)
    )
    del exported
    assert isinstance(on, OnnxRunner)
    try:
        looked, reasons = foreign_modules.look(
            graph, on, off, other, tuned, base, measured.samples, threads=threads, lost=lost
        )
    except ExportError as error:  # a graph that runs, but not with its inner values shown
        log.warning("modules cannot be looked into: %s", error)
        return
    measured.environment["modules_not_found"] = {_called(name): reason for name, reason in reasons.items()}
    rows = [{**row, "name": _called(row["name"])} for row in looked.rows]
    measured.parts |= {"modules": rows, "first_divergent_module": looked.first and _called(looked.first)}
    if rows:
        measured.figures["modules.faulty"] = looked.faulty
    if reasons:
        log.warning(
            "modules: %d of %d were found in the graph; why the others were not is in the report, modules_not_found",
            len(rows),
            len(rows) + len(reasons),
        )


def _called(module: str) -> str:
    """A module as the model calls it, not PEFT's copy of it."""
    return module.replace(".modules_to_save.default", "")


def _torch(base: Path, adapter: PeftAdapter) -> tuple[TorchRunner, TorchRunner, Any, Sequence[str]]:
    """Tuned and base in torch, the tokenizer, and a classifier's class names."""
    if adapter.config["peft_type"] == "DIABLO":
        loaded = Adapter.load(adapter.folder)
        model, tokenizer = load_tuned(base, loaded)
        return TorchRunner(model), TorchRunner(model, adapted=False), tokenizer, loaded.labels
    model, tokenizer = peft_tuned.load(base, adapter)
    runners = [TorchRunner(model, adapted=on, switch=peft_tuned.switch) for on in (True, False)]
    return runners[0], runners[1], tokenizer, peft_tuned.class_names(model)


def _open(
    graph: Graph, other: Graph | None, base: TorchRunner, name: str, threads: int | None, *, classifier: bool
) -> Exported:
    session, runner = _runner(graph, base, threads, classifier)
    swapped = adapter_file(graph.file, name)
    off: OnnxRunner | TorchRunner = base
    if swapped is not None:
        # as plain inputs: onnxruntime's Python does not take an adapter for inputs that have no default
        values = runtime.load_adapter(swapped).values()
        zeros = {key: np.zeros_like(value) for key, value in values.items()}
        runner, off = (dataclasses.replace(runner, fixed=fixed) for fixed in (values, zeros))
    if other is not None:
        off = _runner(other, base, threads, classifier)[1]
    return Exported(runner, off, None, None, session.get_providers()[0], runner.decodes, graph.file)


def _runner(graph: Graph, base: TorchRunner, threads: int | None, classifier: bool) -> tuple[Any, OnnxRunner]:
    config: Any = base.model.config
    session = runtime.session(graph.file, threads=threads, spin=False)
    shape = cache_shape(graph.file.parent) or cache_shape(Path(str(base.model.name_or_path)))
    output = graph.logits(config.num_labels if classifier else config.vocab_size)
    return session, OnnxRunner(session, cache_shape=shape, output=output, length=graph.length)


def _as_run(folder: Path, graph: Graph, exported: Exported, name: str) -> dict[str, Any]:
    """What a certificate says of the graph; see `certificate.write`."""
    runner, swapped = exported.on, adapter_file(graph.file, name)
    assert isinstance(runner, OnnxRunner)
    # the files themselves may be links to elsewhere, as in a cache of downloads
    file, adapter = (
        path and (path.parent.resolve() / path.name).relative_to(folder).as_posix() for path in (graph.file, swapped)
    )
    shape = list(runner.cache_shape) if runner.cache_shape else None
    return {"file": file, "output": runner.output, "length": runner.length, "cache_shape": shape, "adapter": adapter}


def _look_for_loss(
    measured: Measured,
    base: Path,
    adapter: PeftAdapter,
    exported: Exported,
    tuned: TorchRunner,
    off: TorchRunner,
) -> None:
    """Name what is missing: `adapter.whole` is 0 where the export is nearest to the base, or to a part of the adapter.

    Nearer to tuned than to the base is the same as a gain above 1/2, with the base in torch for the exported base.
    """
    few = _few(measured.samples)
    wanted = _distance(exported, tuned, few)
    near = {"without the adapter": _distance(exported, off, few)}
    for what, changes in adapter.lossy().items():
        model, _ = peft_tuned.load(base, adapter, **changes)
        near[f"without {what}"] = _distance(exported, TorchRunner(model, switch=peft_tuned.switch), few)
    nearest = min(near, key=near.__getitem__)
    measured.figures["adapter.whole"] = float(not near[nearest] < wanted)
    if near[nearest] < wanted:
        sure = near[nearest] < _SAME * wanted
        measured.environment["fault"] = (
            f"the export is the model {nearest}: that got lost when it was made"
            if sure
            else f"the export is nearer to the model {nearest} than to the one with all of its {adapter.kind} adapter"
        )


def _few(samples: Sequence[Sample]) -> list[Sample]:
    few: list[Sample] = []
    left = _LOOKED_AT
    for sample in samples:
        if few and len(sample.ids) > left:
            break
        few.append(sample)
        left -= len(sample.ids)
    return few


def _distance(exported: Exported, other: TorchRunner, samples: Sequence[Sample]) -> float:
    """Squared distance of two models' centred logits."""
    return sum(
        float((centred(exported.on.prefill(sample.ids) - other.prefill(sample.ids)) ** 2).sum()) for sample in samples
    )
