"""What the models say, for a person to read: continuations of a few prompts, or a classifier's differing answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diablo_export.measure.compare import Runner
from diablo_export.measure.onnx_runner import OnnxRunner
from diablo_export.measure.prompts import Ids, Sample
from diablo_export.measure.torch_runner import TorchRunner

SHOWN = 3  # prompts, or differing answers


def continuations(
    name: str,
    tokenizer: Any,
    base: TorchRunner,
    exported: Runner,
    prompts: Sequence[Ids],
    tuned: Sequence[Ids],
) -> list[dict[str, Any]]:
    """Free greedy texts of base, tuned and exported, side by side.

    Args:
        name: of the adapter.
        tokenizer: the models'.
        base: the base in torch.
        exported: the export with its adapter on.
        prompts: what was decoded after.
        tuned: the tokens that tuned chose after each of them; the others decode as many.

    Returns:
        `{"adapter", "prompt", "base", "tuned", "exported", "first_difference"}` each; the last is the character of
        exported's text at which it leaves tuned's, None where the texts are one.
    """
    found = []
    # the longest: they say most of the text's kind
    for prompt, wanted in list(zip(prompts, tuned, strict=True))[-SHOWN:]:
        steps = len(wanted)
        said = {"base": base.greedy(prompt, steps)[0], "tuned": wanted, "exported": _greedy(exported, prompt, steps)}
        texts = {model: tokenizer.decode(ids, skip_special_tokens=True) for model, ids in said.items()}
        start = tokenizer.decode(prompt, skip_special_tokens=True)
        parted = first_difference(texts["tuned"], texts["exported"])
        found.append({"adapter": name, "prompt": start, **texts, "first_difference": parted})
    return found


def answers(
    name: str, tokenizer: Any, samples: Sequence[Sample], choices: Mapping[str, Sequence[int]], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """A few texts that exported puts into another class than tuned does, as `continuations` gives them."""
    found: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        said = {model: labels[chosen[index]] for model, chosen in choices.items()}
        if said["tuned"] != said["exported"] and len(found) < SHOWN:
            start = tokenizer.decode(sample.ids, skip_special_tokens=True)
            parted = first_difference(said["tuned"], said["exported"])
            found.append({"adapter": name, "prompt": start, **said, "first_difference": parted})
    return found


def first_difference(one: str, two: str) -> int | None:
    """Index of the first character at which two texts differ; None where they are equal."""
    if one == two:
        return None
    pairs = zip(one, two, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def _greedy(runner: Runner, prompt: Ids, steps: int) -> Ids:
    return runner.greedy(prompt, steps) if isinstance(runner, OnnxRunner) else runner.greedy(prompt, steps)[0]
