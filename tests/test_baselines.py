"""What DiaBlo is compared with: every method starts as the base, trains what it says, and follows its maths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diablo_export.blockdiag import BlockShape
from diablo_export.errors import InputError
from diablo_export.trainer.baselines import METHODS, adapt, equal_rank
from diablo_export.trainer.layer import add_branch
from diablo_export.trainer.model import load_base
from diablo_export.trainer.submatrix import SubmatrixLinear, channels, on_grid, permuted, scattered, strongest
from diablo_export.trainer.targets import choose_targets

Folder = Callable[[str], Path]
IDS = torch.tensor([[5, 9, 7, 30, 11, 6]])


def load(folder: Path) -> tuple[Any, list[str]]:
    network: Any = load_base(folder, "causal-lm")[0]
    return network, choose_targets(network)


def dense(layer: SubmatrixLinear) -> torch.Tensor:
    """The slow, obvious ΔW, (in, out): each sub-matrix added where its channels cross."""
    weight = torch.zeros(layer.weight.shape[::-1])
    for block, rows, columns in zip(layer.blocks, layer.inputs, layer.outputs, strict=True):
        weight = weight.index_put((rows[:, None], columns[None]), block, accumulate=True)
    return weight


@pytest.mark.parametrize("method", METHODS)
def test_methods_start_as_the_base_and_move_away_from_it(method: str, tiny_model: Folder) -> None:
    base, _ = load(tiny_model("llama"))
    network, targets = load(tiny_model("llama"))

    def loss() -> torch.Tensor:
        found: torch.Tensor = network(IDS, labels=IDS).loss
        return found

    trained = adapt(network, method, targets, 4, backward=lambda: loss().backward())  # type: ignore[no-untyped-call]
    assert trained and all(p.requires_grad and p.grad is None for p in trained.values())
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    with torch.no_grad():
        # DoRA divides by a norm and multiplies with it: a few roundings
        assert (network(IDS).logits - base(IDS).logits).abs().max() <= (1e-4 if method == "dora" else 0)
    loss().backward()  # type: ignore[no-untyped-call]
    before = loss().item()
    torch.optim.SGD(trained.values(), lr=0.01).step()
    assert loss().item() < before


def test_methods_train_as_many_parameters_as_diablo(tiny_model: Folder) -> None:
    sizes = {}
    for method in METHODS:
        network, targets = load(tiny_model("llama"))
        rank = equal_rank(network, targets, 4)
        whole = sum(parameter.numel() for parameter in network.parameters())
        step = sum(sum(network.get_submodule(name).weight.shape) for name in targets)  # what a rank costs
        trained = adapt(network, method, targets, 4, backward=lambda n=network: n(IDS, labels=IDS).loss.backward())
        sizes[method] = sum(parameter.numel() for parameter in trained.values())
    assert sizes["permuted"] == sizes["random-block"] == sizes["s2ft"] == sizes["diablo"]
    assert sizes["lora"] == rank * step and abs(sizes["lora"] - sizes["diablo"]) <= step / 2
    assert sizes["full"] == whole
    blocks = 64 * 96 // 16  # the largest that may be left over
    assert sizes["diablo"] - blocks < sizes["smt"] <= sizes["diablo"]


@pytest.mark.parametrize("choose", [permuted, scattered, channels])
def test_forward_and_gradient_are_those_of_the_dense_update(
    choose: Callable[..., dict[str, Any]], tiny_model: Folder
) -> None:
    network, targets = load(tiny_model("llama"))
    places = choose(network, targets, 4, 3)
    torch.manual_seed(0)
    for name in targets[: len(targets) // 2]:  # one layer
        layer = SubmatrixLinear(network.get_submodule(name), *places[name])
        nn.init.normal_(layer.blocks, 0, 0.1)
        x = torch.randn(2, 5, layer.weight.shape[1], requires_grad=True)
        weight = torch.randn(2, 5, layer.weight.shape[0])
        expected = x @ (layer.weight.T + dense(layer))
        # sums of up to 96 products of order 1 in float32, in another order
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad((layer(x) * weight).sum(), (layer.blocks, x))
        wanted = torch.autograd.grad((expected * weight).sum(), (layer.blocks, x))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_on_the_diagonal_it_is_diablo() -> None:
    shape, every = BlockShape.for_linear(24, 36, 6), torch.arange(6)
    layer = SubmatrixLinear(nn.Linear(24, 36), *on_grid(every, every, (24, 36), 6))
    nn.init.normal_(layer.blocks)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), add_branch(layer.base(x), x, layer.blocks, shape))  # the same products


def test_permuted_blocks_read_and_write_every_channel_once(tiny_model: Folder) -> None:
    network, targets = load(tiny_model("llama"))
    for seed in (0, 1):
        for inputs, outputs in permuted(network, targets, 4, seed).values():
            for channel in (inputs, outputs):
                assert sorted(channel.flatten().tolist()) == list(range(channel.numel()))
    pairings = [[o[:, 0].tolist() for _, o in permuted(network, targets, 4, seed).values()] for seed in (0, 0, 1)]
    assert pairings[0] == pairings[1] != pairings[2]


def test_strongest_takes_the_largest_mean_gradients_of_all_modules(tiny_model: Folder) -> None:
    network, targets = load(tiny_model("llama"))
    places = strongest(network, targets, 4, lambda: network(IDS, labels=IDS).loss.backward())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    for name in targets:
        network.get_submodule(name).weight.requires_grad_(True)
    network(IDS, labels=IDS).loss.backward()
    scores, cost = {}, {}
    for name in targets:
        gradient = network.get_submodule(name).weight.grad.T.abs()
        rows, columns = gradient.shape[0] // 4, gradient.shape[1] // 4
        for i in range(4):
            for o in range(4):
                tile = gradient[i * rows : (i + 1) * rows, o * columns : (o + 1) * columns]
                scores[name, i * rows, o * columns] = tile.mean().item()
                cost[name, i * rows, o * columns] = tile.numel()
    taken = {(name, int(i[0]), int(o[0])) for name, pair in places.items() for i, o in zip(*pair, strict=True)}
    weakest, left = min(scores[key] for key in taken), {key for key in scores if key not in taken}
    assert weakest >= max(scores[key] for key in left)
    budget = sum(cost.values()) // 4
    assert sum(cost[key] for key in taken) <= budget < sum(cost[key] for key in taken) + max(cost.values())


def test_channels_of_a_layer_belong_together(tiny_model: Folder) -> None:
    network, _ = load(tiny_model("llama"))
    places = channels(network, choose_targets(network, "all-linear"), 4, 0)
    coupled = {"self_attn.o_proj": ["self_attn.q_proj"], "mlp.down_proj": ["mlp.up_proj", "mlp.gate_proj"]}
    for layer in ("model.layers.0", "model.layers.1"):
        for reader, writers in coupled.items():
            read = places[f"{layer}.{reader}"][0][0]
            assert len(read) == network.get_submodule(f"{layer}.{reader}").in_features // 4
            assert all(torch.equal(read, places[f"{layer}.{name}"][1][0]) for name in writers)
    drawn = [places[f"model.layers.{n}.mlp.up_proj"][1].tolist() for n in (0, 1)]
    assert drawn[0] != drawn[1]


def test_refusals(tiny_model: Folder) -> None:
    network, targets = load(tiny_model("llama"))
    with pytest.raises(InputError, match="method is 'adalora'; it must be one of diablo, lora, dora, full, permuted"):
        adapt(network, "adalora", targets, 4)
    with pytest.raises(
        InputError, match=r"num_blocks is 5, which does not divide the sizes of 10 of 10 target modules"
    ):
        adapt(network, "permuted", targets, 5)
