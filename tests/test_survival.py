"""Text that a model writes, codes distilled on it, and what is measured of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import add_to_weight
from diablo_export.converters.budget import affordable, shortest
from diablo_export.converters.calibration import given_text
from diablo_export.measure.survival import Judge, Survival
from diablo_export.quantization import quantize, unpack
from diablo_export.requantize import Grid
from diablo_export.trainer import sampling
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import distil
from diablo_export.trainer.grid import GridLinear, grid_layers, set_state
from diablo_export.trainer.model import load_base
from diablo_export.trainer.moments import input_moments
from diablo_export.trainer.sampling import random_sentences, sample_text, telling_text
from tests.test_onnx_merge import touched

Get = Callable[..., Path]
Network = tuple[nn.Module, Any, dict[str, GridLinear]]


@pytest.fixture
def network(tiny_model: Get, tiny_adapter: Get) -> Network:
    """The tiny Llama on an int4 grid, with its tokenizer and its grid layers."""
    model, tokenizer = load_base(tiny_model("llama"), "causal-lm")
    for name, module in Adapter.load(tiny_adapter("llama")).modules.items():
        linear = model.get_submodule(name)
        whole = quantize(linear.get_parameter("weight").detach().numpy(), 4, 32)
        zeros = np.full(whole.scales.shape, 8, np.uint8)
        grid = Grid(unpack(whole.codes, 4, 32), whole.scales, zeros, 4, True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, GridLinear(linear, module.shape, module.blocks, grid))
    return model, tokenizer, grid_layers(model)


def test_sampled_text_is_the_tuned_models(network: Network) -> None:
    model, tokenizer, _ = network
    set_state(model, "branch")
    text = sample_text(model, tokenizer, 70, 12)
    assert len(text) == 70 and {len(item.ids) for item in text} == {12}
    assert not {int(item.ids[0]) for item in text} & set(tokenizer.all_special_ids)
    again = sample_text(model, tokenizer, 70, 12)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(text, again, strict=True))
    other = sample_text(model, tokenizer, 70, 12, seed=1)
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(text, other, strict=True))
    ids = torch.from_numpy(np.stack([item.ids for item in text]).astype(np.int64))
    with torch.no_grad():
        surprise = {}
        for state in ("branch", "base"):
            set_state(model, state)  # type: ignore[arg-type]
            chances = torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
            surprise[state] = -float(chances.gather(-1, ids[:, 1:, None]).mean())
    # its own text surprises a model less than another's: by KL(branch ‖ base), 0.8 nats here
    assert surprise["branch"] < surprise["base"] - 0.3


def test_telling_text_is_where_the_fine_tune_says_much(network: Network) -> None:
    model, tokenizer, _ = network
    text = telling_text(model, tokenizer, 18, 12)
    assert len(text) == 18 and {len(item.ids) for item in text} == {12}
    assert not {int(item.ids[0]) for item in text} & set(tokenizer.all_special_ids)
    again = telling_text(model, tokenizer, 18, 12)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(text, again, strict=True))
    set_state(model, "branch")
    plain = sample_text(model, tokenizer, 18, 12)
    told, said = (Judge(model, items, 8).measure().base_kl for items in (text, plain))
    assert told > said  # by little: a model of random weights says about as much anywhere


@pytest.mark.parametrize("name", ["llama", "lfm2"])  # keys and values; the last inputs of convolutions, too
def test_both_models_read_the_rows_that_are_kept(name: str, network: Network, tiny_model: Get) -> None:
    model = network[0] if name == "llama" else load_base(tiny_model(name), "causal-lm")[0]
    ids = torch.randint(3, 270, (2, 5), generator=torch.Generator().manual_seed(0))
    both = sampling._Both(model)
    with torch.no_grad():
        for place in range(3):
            both.read(ids[:, place : place + 1])
        both.repeat(2)
        both.read(ids[:, 3].repeat_interleave(2)[:, None])
        both.keep(torch.tensor([1, 3]))
        both.read(ids[:, 4:])
        for state, found in (("base", both.base), ("branch", both.branch)):
            set_state(model, state)  # type: ignore[arg-type]
            whole = model(input_ids=ids).logits[:, -1]
            torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)  # attention's sums with and without cache


def test_random_sentences(network: Network) -> None:
    tokenizer = network[1]
    found = random_sentences(tokenizer, 40, (3, 9))
    assert {len(item.ids) for item in found} <= set(range(3, 10)) and len({len(item.ids) for item in found}) > 3
    assert not {int(token) for item in found for token in item.ids} & set(tokenizer.all_special_ids)


def test_distillation_brings_the_grid_to_the_branch(network: Network) -> None:
    model, tokenizer, layers = network
    set_state(model, "branch")
    text = sample_text(model, tokenizer, 200, 32)  # of few tokens the codes would learn the noise
    judge = Judge(model, text[:8], 8)
    before = judge.measure()
    assert abs(before.gain) < 1e-3 and before.kl == pytest.approx(before.base_kl, rel=1e-3)  # the grid is the base's
    codes = {}
    for name, layer in layers.items():
        grid = layer.finish()
        codes[name] = grid.codes
        layer.begin(grid, add_to_weight(layer.weight.numpy(), layer.blocks.numpy()))
    losses = distil(model, text[8:], steps=60, batch_size=16, lr=0.1)
    after = judge.measure()
    # 60 steps of up to 0.1, falling, move a latent by three codes: enough for these blocks, of about one code. What is
    # left is for want of text: half of it is not there on the text that was fitted to
    assert after.kl < 0.3 * before.kl and after.gain > 0.75 and after.cosine > 0.8, after
    # of all measures together, which are 5 without adapter; some latents stop at the ends of the range
    assert losses[0] < 0.3 and np.mean(losses[-5:]) < 0.4
    for name, layer in layers.items():
        finished, outside = layer.finish(), ~touched(layer.shape, 32)
        assert outside.any() and not (finished.codes != codes[name])[outside].any()
        assert (finished.codes != codes[name]).any()


def test_moments_of_inputs(network: Network) -> None:
    model, _, layers = network
    text = [Encoded(np.arange(3, 19, dtype=np.int32), np.ones(16, np.bool_))]
    name = next(iter(layers))
    seen = []
    handle = layers[name].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    (found,) = input_moments(model, text, {name: 32}, batch_size=1).values()
    handle.remove()
    x = seen[0].reshape(-1, layers[name].shape.in_features).numpy()
    assert len(found) == 4  # blocks of 16 inputs or so, in groups of 32
    np.testing.assert_allclose(found[0], x[:, :32].T @ x[:, :32] / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("gain", "cosine", "holds"), [(1.0, 0.98, True), (0.96, 0.99, False), (1.04, 0.99, False), (1.0, 0.96, False)]
)
def test_what_holds(gain: float, cosine: float, holds: bool) -> None:
    assert Survival(gain, cosine, 0.01, 0.5, 0.9).holds(0.97) is holds


def test_an_adapter_without_effect_holds() -> None:
    assert Survival(float("nan"), float("nan"), 0.0, 0.0, 1.0).holds()


def test_data_is_parted(network: Network, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{number} ", "completion": "the cat sat"}) for number in range(50)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    for judged, fitted in ((16, 64), (4, 8), (30, 30)):
        text = given_text(
            tmp_path / "data.jsonl", network[1], length=32, classifier=False, judged=judged, fitted=fitted
        )
        ids = [item.ids.tobytes() for item in [*text.judged, *text.fitted]]
        assert len(set(ids)) == len(ids)  # what is measured on was not fitted to
        assert 1 <= len(text.judged) <= judged and 1 <= len(text.fitted) <= fitted
        assert len(ids) >= min(50, judged + fitted) - 20


def test_budget() -> None:
    plenty = affordable(1e-6, 100, 2048)
    assert plenty is not None and (plenty.steps, plenty.batch_tokens) == (150, 2048)
    some = affordable(1e-3, 400, 2048)  # 100,000 tokens: smaller batches first
    assert some is not None and some.steps == 150 and 512 < some.batch_tokens < 1000
    assert some.seconds == pytest.approx(400, rel=0.01)
    few = affordable(1e-3, 150, 2048)
    assert few is not None and (few.steps, few.batch_tokens) == (58, 512)
    assert affordable(1e-2, 400, 2048) is None
    assert shortest(1e-2, 2048).seconds == pytest.approx(40 * 512 * 5 * 1e-2)
