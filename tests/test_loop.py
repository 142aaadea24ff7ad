"""The training loop by itself: accumulation, schedules, clipping, random numbers, and stopping on NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from diablo_export.errors import InputError
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.loop import SCHEDULES, Step, learning_rate, train_loop, warm_up
from diablo_export.trainer.model import checkpoint_activations, load_base
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.targets import choose_targets, wrap_targets


def items(*lengths: int, masked: int = 0) -> list[Encoded]:
    random = np.random.default_rng(0)
    return [
        Encoded(random.integers(3, 300, length).astype(np.int32), np.arange(length) >= masked, label=length % 2)
        for length in lengths
    ]


def network(folder: Path, num_blocks: int = 4) -> torch.nn.Module:
    model, _ = load_base(folder, "causal-lm")
    wrap_targets(model, choose_targets(model), num_blocks)
    return model.train()


def objective(model: torch.nn.Module, classify: bool = False, autocast: bool = False) -> Objective:
    return Objective(model, classify, 0, torch.device("cpu"), autocast)


def gradients(
    model: torch.nn.Module, batches: Sequence[Sequence[Encoded]], seed: int = 0, step: int = 0
) -> dict[str, torch.Tensor]:
    """The gradient of one step, seen through plain descent with rate 1 from zero blocks."""
    goal = objective(model)
    blocks = {name: layer.blocks for name, layer in diablo_layers(model).items()}
    train_loop(
        torch.optim.SGD(blocks.values()), batches=lambda step: batches, loss=goal.loss, targets=goal.targets,
        rate=lambda step: 1.0, start=step, steps=step + 1, clip=None, seed=seed,
    )  # fmt: skip
    return {name: -value.detach() for name, value in blocks.items()}


def test_accumulated_batches_weigh_every_target_the_same(tiny_model: Callable[[str], Path]) -> None:
    data = items(9, 4, 7, 3, masked=2)
    whole = gradients(network(tiny_model("llama")), [data])
    parts = gradients(network(tiny_model("llama")), [data[:1], data[1:2], data[2:]])
    for name, gradient in whole.items():
        # float32 sums of 15 targets' gradients, in other orders and with other padding
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
        assert gradient.abs().max() > 0


def test_loss_is_the_mean_over_the_targets_alone(tiny_model: Callable[[str], Path]) -> None:
    model = network(tiny_model("llama")).eval()
    data = items(9, 5, masked=4)
    goal = objective(model)
    with torch.no_grad():
        expected = 0.0
        for item in data:
            logits = model(input_ids=torch.from_numpy(item.ids.astype(np.int64))[None]).logits[0]
            for position in range(4, len(item.ids)):
                expected -= float(logits[position - 1].log_softmax(-1)[int(item.ids[position])])
        assert goal.targets(data) == 5 + 1
        # float32 log-softmax of six targets; padding must not count
        assert float(goal.loss(data)) == pytest.approx(expected, rel=1e-5)
        assert goal.evaluate(data, 1)["eval_loss"] == pytest.approx(expected / 6, rel=1e-5)


def test_accuracy_counts_right_classes(tiny_model: Callable[[str], Path]) -> None:
    model, _ = load_base(tiny_model("bert"), "text-classification")
    data = items(3, 4, 5, 6, 7)
    found = objective(model, classify=True).evaluate(data, 2)
    with torch.no_grad():
        right = sum(
            int(model(input_ids=torch.from_numpy(item.ids.astype(np.int64))[None]).logits.argmax()) == item.label
            for item in data
        )
    assert found["eval_accuracy"] == right / 5
    assert model.training is False


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 has dropout: its random numbers must come again
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    data = [items(9, 4)]
    plain = gradients(network(tiny_model(architecture)), data)
    model = network(tiny_model(architecture))
    checkpoint_activations(model)
    again = gradients(model, data)
    for name, gradient in plain.items():
        # the same float32 terms; gpt2's are summed in another order. Other dropout would differ in the first digit
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
        assert gradient.any()


def test_dropout_follows_from_seed_and_step(tiny_model: Callable[[str], Path]) -> None:
    data = [items(9, 4)]
    places = ((0, 0), (0, 0), (1, 0), (0, 1))
    first, same, *others = (gradients(network(tiny_model("gpt2")), data, seed, step) for seed, step in places)
    name = next(iter(first))
    assert torch.equal(first[name], same[name]) and not any(torch.equal(first[name], other[name]) for other in others)


def test_the_largest_seed_that_is_taken(tiny_model: Callable[[str], Path]) -> None:
    first, other = (gradients(network(tiny_model("gpt2")), [items(9, 4)], seed) for seed in (2**62 - 1, 2**62 - 2))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_autocast_stays_close_to_float32(tiny_model: Callable[[str], Path]) -> None:
    model = network(tiny_model("llama"))
    exact, half = (float(objective(model, autocast=on).loss(items(9, 4)).detach()) for on in (False, True))
    assert half != exact and half == pytest.approx(exact, rel=0.02)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("warmup", [0, 1, 4, 13])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_is_that_of_transformers(schedule: str, warmup: int) -> None:
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=13)
    ours = learning_rate(2.0, steps=13, warmup=warmup, schedule=schedule)
    for step in range(13):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15), step  # the same sums
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_twentieth_and_no_longer_than_the_run() -> None:
    assert [warm_up(steps, None) for steps in (1, 19, 20, 400)] == [0, 0, 1, 20]
    assert (warm_up(8, 0), warm_up(8, 3), warm_up(8, 100)) == (0, 3, 8)


def loop(loss: Callable[[Any], torch.Tensor], parameter: torch.nn.Parameter, **more: Any) -> list[Step]:
    done: list[Step] = []
    train_loop(
        torch.optim.SGD([parameter]), batches=lambda step: [items(2)], loss=loss, targets=len, rate=lambda step: 0.1,
        after_step=done.append, **more,
    )  # fmt: skip
    return done


def test_clipping_limits_the_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    steps = loop(lambda batch: 30 * parameter.sum(), parameter, steps=1, clip=1.0)
    assert steps[0].grad_norm == 30.0
    assert parameter.item() == pytest.approx(-0.1, rel=1e-5)


@pytest.mark.parametrize(("start", "message"), [(0, "the model itself is broken, copy it again"), (1, "lower --lr")])
def test_weights_that_the_optimizer_broke_are_no_broken_model(start: int, message: str) -> None:
    parameter = torch.nn.Parameter(torch.full((1,), math.nan))
    with pytest.raises(InputError, match=message):
        loop(lambda batch: parameter.sum(), parameter, start=start, steps=2, culprit=lambda parts: "a itself holds NaN")


def test_a_loss_that_nothing_trained_has_a_part_in_is_refused() -> None:
    with pytest.raises(InputError, match=r"step 1 reaches nothing that is trained: .* choose others"):
        loop(lambda batch: torch.ones(2).sum(), torch.nn.Parameter(torch.ones(1)), steps=1)


def test_steps_are_counted_from_start() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    steps = loop(lambda batch: parameter.square().sum(), parameter, steps=5, start=3)
    assert [step.step for step in steps] == [4, 5]
    assert steps[0].tokens == 2 and steps[0].loss == 1.0


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (math.nan, r"the loss is nan at step 1 \(learning rate 0.1\): .*lower --lr"),
        (math.inf, "the loss is inf at step 1"),
        (3e38, "the gradient's norm is inf at step 1"),
    ],
)
def test_divergence_stops_before_the_weights_are_spoiled(factor: float, message: str) -> None:
    parameter = torch.nn.Parameter(torch.full((2,), 0.1))
    with pytest.raises(InputError, match=message):
        loop(lambda batch: (factor * parameter).mean() + (factor * parameter[0] * 3).clamp(max=1), parameter, steps=3)
    assert parameter.tolist() == pytest.approx([0.1, 0.1])
