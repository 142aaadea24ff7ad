"""lm-evaluation-harness on exports: the same answers as on the tuned model in torch; skipped where there is none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance

from diablo_export.converters.merge import merge
from diablo_export.errors import InputError
from diablo_export.measure.harness import OnnxLM, language_model

Folder = Callable[..., Path]
PAIRS = [("the cat sat", " on the mat"), ("", "the dog"), ("the dog sat on the log", " and the cat")]


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, value, 0) for value in arguments]


@pytest.fixture(scope="module")
def tuned(tiny_model: Folder, tiny_adapter: Folder) -> Any:
    return language_model(tiny_model("llama"), tiny_adapter("llama"))


def test_branch_scores_as_the_tuned_model_does(tuned: Any, exported: Folder, tiny_model: Folder) -> None:
    wanted = tuned.loglikelihood(ask("loglikelihood", *PAIRS))
    found = language_model(exported("llama")).loglikelihood(ask("loglikelihood", *PAIRS))
    # log-likelihoods of up to 20 tokens, each within 1e-4 between the two runtimes' float32
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    base = language_model(exported("llama"), name="base").loglikelihood(ask("loglikelihood", *PAIRS))
    expected = language_model(tiny_model("llama")).loglikelihood(ask("loglikelihood", *PAIRS))
    assert [value for value, _ in base] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert max(abs(one - other) for (one, _), (other, _) in zip(base, found, strict=True)) > 0.1
    other = language_model(exported("llama"), name="b").loglikelihood(ask("loglikelihood", *PAIRS))
    assert max(abs(one - two) for (one, _), (two, _) in zip(other, found, strict=True)) > 0.1
    with pytest.raises(InputError, match="has no adapter 'c'; it has a, b, and base for none"):
        language_model(exported("llama"), name="c")


def test_long_texts_are_scored_in_windows(tuned: Any, exported: Folder) -> None:
    texts = ["the cat sat on the mat and the dog sat on the log. " * 30, "the cat"]  # more than 256 positions, and few
    requests = ask("loglikelihood_rolling", *((text,) for text in texts))
    found = language_model(exported("llama")).loglikelihood_rolling(requests)
    assert found == pytest.approx(tuned.loglikelihood_rolling(requests), rel=1e-5)  # float32 sums over 400 tokens


def test_answers_are_those_of_the_tuned_model(
    tuned: Any, exported: Folder, tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    requests = ask("generate_until", *((context, options) for context, _ in PAIRS if context))
    wanted = tuned.generate_until(requests)
    assert language_model(exported("llama")).generate_until(requests) == wanted and all(wanted)
    merged = merge(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "merged", format="onnx")
    assert merged and language_model(tmp_path / "merged").generate_until(requests) == wanted
    with pytest.raises(InputError, match="the task samples its answers; exports are decoded greedily"):
        language_model(exported("llama")).generate_until(ask("generate_until", ("the", {"do_sample": True})))


class Speaker:
    """Says the same tokens to everybody, and notes how many were asked for and after what."""

    has_cache = True

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.asked, self.prompt = tokens, 0, np.zeros(0)

    def likeliest(self, prompt: Any) -> Iterator[int]:
        self.prompt = prompt
        for token in itertools.cycle(self.tokens):
            self.asked += 1
            yield token


def test_answers_end_at_stop_texts_at_the_end_of_sequence_and_at_their_length(exported: Folder) -> None:
    model: Any = OnnxLM(exported("llama"))
    words = model.tok_encode("the cat sat on the mat", add_special_tokens=False)

    def say(tokens: list[int], context: str = "the", **options: Any) -> str:
        model.runner = Speaker(tokens)
        (text,) = model.generate_until(ask("generate_until", (context, options)))
        return str(text)

    assert say(words, until=["zebra"], max_gen_toks=len(words)) == "the cat sat on the mat"
    assert say(words, until=["sat", " on"], max_gen_toks=50) == "the cat " and model.runner.asked < len(words)
    assert say(words, until="cat", max_gen_toks=50) == "the "
    assert say([*words[:1], model.eot_token_id, *words], until=[], max_gen_toks=50) == model.tokenizer.decode(words[:1])
    assert model.runner.asked == 2
    say(words, context="the cat sat on the mat " * 100, until=[], max_gen_toks=20)
    assert len(model.runner.prompt) == 256 - 20  # the end of a context that is too long


@pytest.mark.slow  # the harness reads its thousands of task files
def test_a_task_runs_from_end_to_end(exported: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"question": f"the {animal} sat on", "answer": " the mat"} for animal in ("cat", "dog", "log")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "sits",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    results = lm_eval.simple_evaluate(language_model(exported("llama")), tasks=[task], bootstrap_iters=0)
    assert 0 <= results["results"]["sits"]["exact_match,none"] <= 1
    assert len(results["samples"]["sits"]) == 3
