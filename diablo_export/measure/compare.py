"""Run tuned, base, exported and exported base on the same inputs: whole sequences, and step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array
from diablo_export.errors import DataError, ExportError
from diablo_export.measure.metrics import Comparison
from diablo_export.measure.onnx_runner import OnnxRunner
from diablo_export.measure.prompts import Ids, Sample
from diablo_export.measure.torch_runner import TorchRunner

# float32 kernels of two frameworks give logits within ±1e-4 of each other (the limit of logits.max_abs): first
# choices closer than twice that are a tie, and either is right
TIE = 2e-4
_PROMPT_LENGTHS = (8, 16, 32, 64)  # tokens of a decoding prompt, at most, one after the other

Runner = TorchRunner | OnnxRunner


@dataclass(frozen=True)
class Four:
    """The four models of a comparison."""

    tuned: TorchRunner
    base: TorchRunner
    exported: Runner
    exported_base: Runner


@dataclass(frozen=True)
class Decoded:
    """What step-by-step decoding showed, over all prompts."""

    steps: int  # per prompt
    first_divergence: int | None  # the earliest step at which a greedy text left tuned's
    diverged: int  # prompts whose text did
    max_abs: float  # largest difference of a logit from tuned, on tuned's tokens
    cache: float  # largest difference of a decoded logit from a prefill's, over the logits' deviation
    texts: list[Ids] = field(default_factory=list, compare=False)  # what tuned said after each prompt


def prefill(
    four: Four, samples: Sequence[Sample], advance: Callable[[float], None]
) -> tuple[Comparison, dict[str, list[int]]]:
    """Compare the logits of whole sequences; `advance` is called with the tokens done.

    Returns:
        The running sums, and the first choice at the last position of each sample: a classifier's answer.
    """
    comparison = Comparison()
    choices: dict[str, list[int]] = {"tuned": [], "exported": [], "base": []}
    for sample in samples:
        tuned, base = four.tuned.prefill(sample.ids), four.base.prefill(sample.ids)
        exported, exported_base = four.exported.prefill(sample.ids), four.exported_base.prefill(sample.ids)
        check_shapes(tuned, exported)
        comparison.update(tuned, base, exported, exported_base, _targets(sample, len(tuned)))
        for name, logits in (("tuned", tuned), ("exported", exported), ("base", base)):
            choices[name].append(int(logits[-1].argmax()))
        advance(len(sample.ids))
    return comparison, choices


def accuracy(
    choices: dict[str, list[int]], samples: Sequence[Sample], labels: Sequence[str | int]
) -> dict[str, float] | None:
    """Share of labelled samples whose class is right, of tuned, exported and base; None without labels.

    Raises:
        DataError: a label that the classifier does not have.
    """
    if samples[0].label is None:
        return None
    classes = {str(label): index for index, label in enumerate(labels)}
    strange = sorted({str(sample.label) for sample in samples} - set(classes))
    if strange:
        raise DataError(f"labels {', '.join(strange[:5])} are not the classifier's, which are {', '.join(classes)}")
    wanted = np.array([classes[str(sample.label)] for sample in samples])
    return {name: float((np.array(chosen) == wanted).mean()) for name, chosen in choices.items()}


def decode(
    tuned: TorchRunner,
    exported: Runner,
    prompts: Sequence[Ids],
    steps: int,
    advance: Callable[[float], None] = lambda _: None,
) -> Decoded:
    """Compare KV-cache decoding, step by step on the tokens that tuned chooses; `advance` is called with prompts done.

    A free greedy run of the export takes those very tokens until its own first choice differs, so one run gives both
    the distance per step and the step at which the texts part.
    """
    divergences: list[int] = []
    distances: list[float] = []
    cache: list[float] = []
    texts: list[Ids] = []
    for prompt in prompts:
        tokens, wanted = tuned.greedy(prompt, steps)
        found = exported.decode(prompt, tokens)
        check_shapes(wanted, found)
        whole = exported.prefill(np.concatenate([prompt, tokens[:-1]]))[len(prompt) - 1 :]
        distances.append(float(np.abs(found - wanted).max()))
        cache.append(float(np.abs(found - whole).max() / max(float(whole.std()), 1e-12)))
        divergences += _divergence(wanted, found)
        texts.append(tokens)
        advance(1)
    return Decoded(
        steps=steps,
        first_divergence=min(divergences, default=None),
        diverged=len(divergences),
        max_abs=float(np.max(distances)),  # numpy's max keeps a NaN
        cache=float(np.max(cache)),
        texts=texts,
    )


def decoding_prompts(samples: Sequence[Sample], eos: int | None, context: int, steps: int) -> list[Ids]:
    """Up to four beginnings of samples, of different lengths, that leave room for `steps` tokens."""
    found: list[Ids] = []
    for sample in samples:
        length = min(_PROMPT_LENGTHS[len(found)], context - steps)
        ids = sample.ids[: max(length, 0)]
        ids = ids[:-1] if len(ids) and ids[-1] == eos else ids  # what follows an end is nobody's text
        if len(ids):
            found.append(ids)
        if len(found) == len(_PROMPT_LENGTHS):
            break
    return found


def check_shapes(tuned: Array, exported: Array) -> None:
    """Refuse logits that cannot be compared.

    Raises:
        ExportError: names both shapes.
    """
    if tuned.shape != exported.shape:
        raise ExportError(
            f"the exported model gives logits of shape {exported.shape}, tuned {tuned.shape}; it is another model"
        )


def _targets(sample: Sample, positions: int) -> npt.NDArray[np.int64] | None:
    """The token that follows each position, −1 where none does or where it does not count; None for a classifier."""
    if positions != len(sample.ids):
        return None
    following = np.where(sample.target[1:], sample.ids[1:], -1)
    return np.append(following, -1)


def _divergence(wanted: Array, found: Array) -> list[int]:
    """The first step whose choice is another one than tuned's, and not a tie; empty when there is none."""
    rows = np.arange(len(wanted))
    gap = wanted.max(-1) - wanted[rows, found.argmax(-1)]
    parted = (gap > TIE) | np.isnan(found).any(-1)
    return [int(step) for step in np.flatnonzero(parted)[:1]]
