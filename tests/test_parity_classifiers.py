"""Parity of classifiers: accuracy in place of perplexity and decoding, heads, int8 against what the adapter changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diablo_export.adapter import Adapter
from diablo_export.errors import DataError
from diablo_export.measure.parity import parity
from tests import exports, tiny
from tests.exports import SMALL
from tests.test_parity import KEYS

Get = Callable[[str], Path]


def test_a_classifier_has_accuracy_in_place_of_perplexity_and_decode(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    out = exports.merged(tiny_model("bert"), tiny_adapter("bert"), tmp_path / "out")
    data = tmp_path / "data.jsonl"
    lines = [{"text": f"the dog {'sat ' * i}", "label": "positive" if i % 2 else "negative"} for i in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = parity(out, data=data, **SMALL)
    assert report["verdict"] == "pass", exports.failed(report)
    assert list(report) == [*KEYS[:6], "accuracy", *KEYS[8:]]
    assert list(report["accuracy"]) == ["tuned", "exported", "base"]
    assert exports.checks(report)["accuracy.drop"]
    assert parity(out, **SMALL)["accuracy"] is None  # the built-in prompts have no labels

    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps({"text": "a cat", "label": "neutral"}) + "\n")
    with pytest.raises(DataError, match=r"labels neutral are not the classifier's, which are negative, positive"):
        parity(out, data=strange, **SMALL)


@pytest.mark.slow  # two more exports by torch
@pytest.mark.parametrize("scale", [1.0, 0.0, 2.0])
def test_a_quantized_classifier_is_held_against_what_its_adapter_changes(
    scale: float, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    true = tiny_adapter("bert")
    went_in = exports.scaled(true, tmp_path / "wrong", scale)
    out = exports.merged(tiny_model("bert"), went_in, tmp_path / "out", quantize="int8")
    # random weights are hard to round: int8 activations alone take more of this effect than a trained model loses
    report = parity(exports.pretend(out, true), limit={"adapter.survival_gain": 0.75}, **SMALL)
    held = exports.checks(report)
    assert not {"kl.ratio", "top1_agreement.drop"} & set(held)
    assert held["kl.share"] is (scale == 1)
    assert report["verdict"] == ("pass" if scale == 1 else "fail"), (exports.failed(report), report["checks"])


@pytest.mark.slow  # another export by torch
def test_a_classifier_s_branches_keep_each_adapter_s_own_head(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    """The graph's default head is the first adapter's; the second is compared with its own, on and off."""
    second = tiny.make_adapter(tiny_model("bert"), tmp_path / "second", num_blocks=2, seed=5)
    loaded = Adapter.load(second)
    loaded.saved["classifier.weight"] *= np.float32(-0.7)
    loaded.save(second)
    out = exports.branched(tiny_model("bert"), {"a": tiny_adapter("bert"), "b": second}, tmp_path / "out")
    report = parity(out, **SMALL)
    assert report["verdict"] == "pass", exports.failed(report)
