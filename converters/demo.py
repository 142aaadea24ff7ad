"""The verb `demo`: the whole road, on a small model made on the spot, without a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.converters import demo_model
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.output import check_output, new_folder

TOKENS = 80  # of each text
TEMPERATURE = 0.5


@dataclass(frozen=True)
class Demo:
    """What the demo made and measured."""

    output: Path
    texts: dict[str, str]  # base, tuned, int4: what each writes on an empty page
    parity: dict[str, dict[str, Any]]  # merged, branch: their reports
    base_loss: float
    eval_losses: tuple[float, float]  # of the held-out code, before and after the adapter was trained
    seconds: dict[str, float]  # by stage

    @property
    def passed(self) -> bool:
        """Whether every check of both reports held."""
        return all(report["verdict"] == "pass" for report in self.parity.values())


class Model(Protocol):
    """What can continue a text: measure's runners."""

    def prefill(self, ids: npt.NDArray[np.int64]) -> Array:
        """Logits of a sequence (tokens,): (tokens, vocabulary)."""


def demo(output: str | Path = "diablo-demo", quick: bool = False, overwrite: bool = False) -> Demo:
    """Make a small model of English prose, adapt it to Python code, merge into int4, export a branch, prove both.

    Args:
        output: where models, data, adapter and reports go.
        quick: a handful of training steps: every stage runs, the texts make no sense.
        overwrite: replace `output` if it exists.

    Raises:
        OutputError: `output` exists or cannot be written.
        DependencyError: torch, transformers or onnxruntime is missing.
    """
    check_output(output, overwrite)
    place = Path(output)
    seconds: dict[str, float] = {}

    def stage(name: str, what: str, work: Callable[[], Any]) -> Any:
        log.info("%d. %s", len(seconds) + 1, what)
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    base, adapter, int4, branch = (place / name for name in ("base", "adapter", "int4", "branch"))
    data = place / "data"
    loss = stage("base", "A small model learns English prose", lambda: _base(base, data, quick, overwrite))
    training = stage(
        "train", "Blocks learn Python code; the model is frozen", lambda: _adapt(base, data, adapter, quick, overwrite)
    )
    stage(
        "merge",
        "The blocks are merged into int4",
        # the quick demo's adapter has learnt next to nothing: there is no fine-tune to keep
        lambda: merge(base, adapter, int4, quantize="int4", method="rtn" if quick else None, overwrite=overwrite),
    )
    stage(
        "export", "The blocks become a branch beside an int4 base",
        lambda: export(base, {"code": adapter}, branch, quantize="int4", overwrite=overwrite),
    )  # fmt: skip
    reports = stage("parity", "Both are compared with the tuned model", lambda: _prove(data, int4, branch, quick))
    texts = stage("texts", "Base, tuned and int4 write on an empty page", lambda: _write(base, adapter, int4))
    before, after = training.evaluations[0]["eval_loss"], training.evaluations[-1]["eval_loss"]
    return Demo(place, texts, reports, loss, (before, after), seconds)


def _base(folder: Path, data: Path, quick: bool, overwrite: bool) -> float:
    with new_folder(data, overwrite) as place:
        demo_model.write_data(place)
    with new_folder(folder, overwrite) as place:
        return demo_model.train_model(place, steps=20 if quick else 800)


def _adapt(base: Path, data: Path, adapter: Path, quick: bool, overwrite: bool) -> Any:
    from diablo_export.trainer.train import train

    steps = 10 if quick else 200
    return train(
        base, data / "train.jsonl", adapter, eval_data=data / "test.jsonl", num_blocks=4, target_modules="all-linear",
        lr=8e-3, max_steps=steps, batch_size=8, max_length=128, eval_every=steps, overwrite=overwrite,
    )  # fmt: skip


def _prove(data: Path, int4: Path, branch: Path, quick: bool) -> dict[str, dict[str, Any]]:
    from diablo_export.measure.parity import parity

    options: dict[str, Any] = {"data": data / "test.jsonl", "max_tokens": 256 if quick else 2048, "steps": 16}
    return {name: parity(folder, **options) for name, folder in (("merged", int4), ("branch", branch))}


def _write(base: Path, adapter: Path, int4: Path) -> dict[str, str]:
    """What the three models write on an empty page; the same random numbers for each."""
    from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
    from diablo_export.measure.torch_runner import TorchRunner
    from diablo_export.trainer.model import load_tuned

    tuned, tokenizer = load_tuned(base, Adapter.load(adapter))
    exported = OnnxRunner(runtime.session(int4 / "model.onnx"), cache_shape=cache_shape(int4))
    models: dict[str, Model] = {"base": TorchRunner(tuned, False), "tuned": TorchRunner(tuned), "int4": exported}
    end: int = tokenizer.eos_token_id
    return {name: str(tokenizer.decode(_sample(model, end))) for name, model in models.items()}


def _sample(model: Model, end: int) -> list[int]:
    """At most TOKENS tokens after an `end`, which is where a document begins, up to the next one.

    The noise that picks them is the same for every model, so that texts differ where logits do.
    """
    random = np.random.default_rng(0)
    ids = np.array([end])
    for _ in range(TOKENS):
        logits = model.prefill(ids)[-1].copy()
        if len(ids) < TOKENS // 2:
            logits[end] = -np.inf  # a text of two words shows nothing
        choice = np.argmax(logits / TEMPERATURE + random.gumbel(size=logits.shape))  # a draw from softmax(logits / T)
        if choice == end:
            break
        ids = np.append(ids, choice)
    return [int(token) for token in ids[1:]]
