"""Blocks in closed form against the rounding of a base: the least-squares solution, and less divergence on a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import BlockShape, apply
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import InputError
from diablo_export.trainer import repair as module
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import divergence
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.model import load_base
from diablo_export.trainer.quantized import pack_base
from diablo_export.trainer.repair import repair, some
from diablo_export.trainer.targets import choose_targets, wrap_targets
from diablo_export.trainer.train import train
from tests.test_quantized import RUN
from tests.test_quantized import texts as texts

Get = Callable[[str], Path]


@pytest.mark.parametrize("sizes", [(12, 8, 4), (7, 9, 3)])  # the second is padded
def test_the_fit_is_that_of_least_squares(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DAMPING", 1e-9)
    shape, random = BlockShape.for_linear(*sizes), np.random.default_rng(0)
    mixed = random.normal(size=(shape.in_features, shape.in_features))
    x = (random.normal(size=(200, shape.in_features)) @ mixed).astype(np.float32)
    error = random.normal(size=(shape.out_features, shape.in_features)).astype(np.float32)
    blocks = module._fitted(torch.from_numpy(x.T @ x), torch.from_numpy(error), shape).numpy()
    for block, (inputs, outputs) in enumerate(shape.slices()):
        wanted = np.linalg.lstsq(x[:, inputs], x @ error[outputs].T, rcond=None)[0]
        found = blocks[block, : inputs.stop - inputs.start, : outputs.stop - outputs.start]
        assert np.allclose(found, wanted, atol=1e-2)  # normal equations in float32, condition about 1e4
    left = np.linalg.norm(x @ error.T - apply(x, blocks, shape.out_features))
    assert left < 0.95 * np.linalg.norm(x @ error.T)


def test_it_takes_back_some_of_what_rounding_did(tiny_model: Get) -> None:
    base = tiny_model("llama")
    random = np.random.default_rng(0)
    items = [Encoded(random.integers(3, 320, 24).astype(np.int32), np.ones(24, np.bool_)) for _ in range(48)]
    whole, _ = load_base(base, "causal-lm")
    network, _ = load_base(base, "causal-lm")
    wrap_targets(network, choose_targets(network, "all-linear"), 2)
    pack_base(network, BaseGrid(2, 32, False), leave=["lm_head"])
    ids = torch.from_numpy(np.stack([item.ids for item in items[40:]]).astype(np.int64))

    @torch.no_grad()
    def off() -> float:
        wanted, found = (each(ids).logits.log_softmax(-1).flatten(0, 1) for each in (whole, network))
        return float(divergence(wanted, found))

    before, passes = off(), []
    assert not repair(network, Checkpoint.open(base), items[:40], batch_size=16, advance=passes.append)
    assert passes == [3, 1, 2, 1] * 2, "q, k and v read one input, gate and up another"
    assert off() < 0.8 * before
    assert all(layer.blocks.abs().max() > 0 for layer in diablo_layers(network).values())


def test_what_the_text_never_reaches_stays_as_it_is(tiny_model: Get) -> None:
    network, _ = load_base(tiny_model("llama"), "causal-lm")
    network.aside = torch.nn.Linear(8, 8)
    wrap_targets(network, ["model.layers.0.self_attn.q_proj", "aside"], 2)
    pack_base(network, BaseGrid(4, 16, True))
    items = [Encoded(np.arange(3, 9, dtype=np.int32), np.ones(6, np.bool_))]
    assert repair(network, Checkpoint.open(tiny_model("llama")), items, batch_size=1) == ["aside"]


def test_text_from_all_over_the_data() -> None:
    items = [Encoded(np.full(10, n, np.int32), np.ones(10, np.bool_)) for n in range(100)]
    chosen = some(items, 200)
    assert [int(item.ids[0]) for item in chosen] == list(range(0, 100, 5))
    assert some(items[:3], 200) == items[:3]


def test_a_run_begins_at_the_repair(tiny_model: Get, texts: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {**RUN, "lr": 1e-9, "eval_fraction": 0.2, "max_steps": 1, "base_quantize": "int2"}
    losses = {}
    for kind in (False, True):
        done = train(tiny_model("llama"), texts / "text.jsonl", tmp_path / str(kind), repair_base=kind, **how)
        losses[kind] = done.evaluations[0]["eval_loss"]
    assert losses[True] != losses[False]
    assert all(one.blocks.any() for one in Adapter.load(tmp_path / "True").modules.values())
    for options, message in (
        ({"base_quantize": "none"}, "--repair-base: a float base has no rounding to be repaired"),
        ({"init_adapter": tmp_path / "True"}, "both --repair-base and --init-adapter say what blocks begin at"),
    ):
        with pytest.raises(InputError, match=message):
            train(tiny_model("llama"), texts / "text.jsonl", tmp_path / "x", repair_base=True, **{**how, **options})
    log = [json.loads(line) for line in (tmp_path / "True/training.jsonl").read_text().splitlines()]
    assert [one["step"] for one in log if "loss" in one] == [1]
