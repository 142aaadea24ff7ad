"""What a run takes, said before it starts: memory against torch's own count, the plan's numbers, advice that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import nn

from diablo_export.adapter import Adapter
from diablo_export.errors import InputError
from diablo_export.trainer import plan as planning
from diablo_export.trainer.batches import Batches
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.memory import estimate, per_item
from diablo_export.trainer.model import checkpoint_activations, load_base
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.plan import advice, memory_advice
from diablo_export.trainer.targets import choose_targets, wrap_targets
from diablo_export.trainer.train import train


def network(folder: Path, fold: bool = True) -> tuple[Objective, list[nn.Parameter]]:
    classify = (folder / "config.json").read_text().find('"bert"') > 0
    model, _ = load_base(folder, "text-classification" if classify else "causal-lm")
    model.config.use_cache = False
    wrap_targets(model, choose_targets(model), 4)
    layers = diablo_layers(model).values()
    if fold:
        fold_blocks(layers)
    return Objective(model.train(), classify, 0, torch.device("cpu"), False), [layer.blocks for layer in layers]


def items(count: int, length: int) -> list[Encoded]:
    return [Encoded(np.arange(length, dtype=np.int32) + 3, np.ones(length, np.bool_), label=0) for _ in range(count)]


def measured(objective: Objective, batch: list[Encoded]) -> int:
    """Most bytes that torch's allocator had given out at once during a forward and a backward pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.backward(objective.loss(batch))
    objective.model.zero_grad()
    held = most = 0
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("architecture", "again"), [("llama", False), ("llama", True), ("gpt2", False), ("bert", False), ("gemma2", True)]
)
def test_estimate_is_near_what_torch_hands_out(
    architecture: str, again: bool, tiny_model: Callable[[str], Path]
) -> None:
    objective, parameters = network(tiny_model(architecture))
    if again:
        checkpoint_activations(objective.model)
    found = estimate(objective, parameters, 8, 96)
    peak = measured(objective, items(8, 96))
    # shapes alone are exact but for what an operator takes for itself, and for one copy of the logits that is freed
    # sooner in a real pass: with 320 words it is an eighth of a decoder's peak
    assert 0.97 * peak <= found.activations + found.gradients <= 1.2 * peak
    size = sum(parameter.numel() for parameter in parameters) * 4
    assert (found.trained, found.gradients, found.optimizer) == (size, size, 2 * size)
    held = {p.data_ptr(): p.numel() for p in objective.model.parameters()}
    # buffers (rotary frequencies, position ids) are a few kilobytes
    assert found.weights == pytest.approx(sum(held.values()) * 4 - size + size, rel=0.01)
    assert all(parameter.grad is None for parameter in parameters)


def test_estimating_changes_no_number(tiny_model: Callable[[str], Path]) -> None:
    objective, parameters = network(tiny_model("llama"))
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.05)
    before = objective.loss(items(2, 9)).item()
    with torch.no_grad():
        parameters[0].zero_()  # what the weight holds now is stale
    estimate(objective, parameters, 1, 9)
    branch, others = network(tiny_model("llama"), fold=False)
    with torch.no_grad():
        for parameter, other in zip(parameters, others, strict=True):
            other.copy_(parameter)
    assert objective.loss(items(2, 9)).item() != before
    # float32, in another order of sums
    assert objective.loss(items(2, 9)).item() == pytest.approx(branch.loss(items(2, 9)).item(), rel=1e-5)


def test_dry_run_says_what_a_run_takes_and_writes_nothing(
    run: Callable[..., Result], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 12}) + "\n")
    command = ["train", "-m", tiny_model("llama"), "-d", data, "-o", tmp_path / "a", "--num-blocks", 4]
    command += ["--max-length", 16, "--batch-size", 2, "--epochs", 3, "--dry-run"]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]
    assert report["memory"]["total"] == sum(size for kind, size in report["memory"].items() if kind != "total")
    assert report["fits"] and report["advice"] is None and report["longest"] == 16
    assert report["seconds"] == pytest.approx(report["seconds_per_step"] * report["steps"])
    done = train(tiny_model("llama"), data, tmp_path / "b", num_blocks=4, max_length=16, batch_size=2, epochs=3)
    assert (report["steps"], report["trainable"]) == (done.steps, Adapter.load(tmp_path / "b").parameters)
    log = [json.loads(line) for line in (tmp_path / "b" / "training.jsonl").read_text().splitlines()]
    assert report["tokens"] == sum(record["tokens"] for record in log if "loss" in record)
    text = planning.describe(report)
    assert f"trained {done.parameters:,}" in text and "weights" in text and "activations" in text and "a step" in text


def test_memory_that_runs_out_is_a_message_with_what_would_fit(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, parameters = network(tiny_model("llama"))
    batches = Batches(items(16, 64), batch_size=8)
    base, item = per_item(objective, parameters, 64)
    beside = 3 * 4 * sum(parameter.numel() for parameter in parameters)
    monkeypatch.setattr(planning, "free_memory", lambda device: beside + base + 5 * item)
    with pytest.raises(InputError) as error, memory_advice(objective, parameters, batches):
        raise torch.OutOfMemoryError("tried to allocate 9 GB\nmore")
    said = str(error.value)
    assert said.startswith("out of memory (tried to allocate 9 GB). Batches of 8 items of 64 tokens")
    assert "--batch-size 4 --grad-accumulation 2 (the same steps)" in said  # 5 fit; 4 share the 8 out evenly
    assert "--max-length 32" in said and "--gradient-checkpointing" in said
    # they fit indeed
    assert base + 4 * item <= base + 5 * item and sum(per_item(objective, parameters, 32)) < base + 5 * item
    monkeypatch.setattr(planning, "free_memory", lambda device: 1)
    assert "Not even one item fits" in advice(objective, parameters, batches, beside)


def test_what_is_out_of_memory_and_what_is_not(tiny_model: Callable[[str], Path]) -> None:
    objective, parameters = network(tiny_model("llama"))
    batches: Any = Batches(items(4, 8), batch_size=2)
    for far_too_much in (lambda: torch.empty(1 << 55), lambda: bytearray(1 << 55)):  # 32 PB
        with pytest.raises(InputError, match="out of memory"), memory_advice(objective, parameters, batches):
            far_too_much()
    with pytest.raises(RuntimeError, match="other"), memory_advice(objective, parameters, batches):
        raise RuntimeError("other")


def test_packed_weights_count_as_weights(
    run: Callable[..., Result], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 12}) + "\n")
    command = ["train", "-m", tiny_model("llama"), "-d", data, "-o", tmp_path / "a", "--num-blocks", 4]
    command += ["--max-length", 16, "--max-steps", 1, "--dry-run", "--json"]
    plain = json.loads(run(*command).stdout)
    packed = json.loads(run(*command, "--base-quantize", "int4", "--group-size", 32).stdout)
    assert packed["parameters"] == plain["parameters"]
    # the linear layers of the blocks are most of this model; half a byte and a scale per 32 in place of four bytes
    assert packed["memory"]["weights"] < plain["memory"]["weights"] / 2
