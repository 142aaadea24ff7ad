"""Blocks that move int4 codes (`train --on-grid`) against ternary adapters that do (LoTA-QAF's idea, arXiv 2505.18724).

    python examples/benchmarks/ternary_on_grid.py --data-dir DATA [--steps 100] [--seeds 3]

DATA holds tinystories656k-hf/ and tinyshakespeare/input.txt (default: DIABLO_EXPORT_TEST_DATA). Both methods train as
many weights, in the same loop, on the same batches, beside the same int4 base (symmetric), and both merge exactly.
Each gets the best of its own settings, by held-out loss with the first seed; then all seeds.

The ternary adapter, as its paper has it and written anew here: B (out, rank) and A (rank, in) hold −1, 0 and 1, and
B · A counts votes for each weight. Where more than ω vote the same way, the code moves by one step, as far as its range
allows; what the votes leave, averaged over each group and divided by ω, is added to the group's zero point. Gradients
pass through the threshold as if it were not there. A step of t-SignSGD moves by one against their sign those entries
of a matrix whose gradients are largest: a share of 5 %, falling to 0.1 % over four fifths of the run and to 0.01 % in
the rest. A begins as normal numbers cut to three values at 0.75 of their mean magnitude, B at zero; ω is 0.75 of the
rank. Prints a line per trial on standard error, and one Markdown table row per method.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import shakespeare
from torch import Tensor, nn
from torch.nn import functional

from diablo_export import train
from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.trainer import trial
from diablo_export.trainer.baselines import equal_rank
from diablo_export.trainer.batches import Batches
from diablo_export.trainer.loop import train_loop
from diablo_export.trainer.model import replace_module
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.quantized import QuantizedLinear, pack_base
from diablo_export.trainer.targets import choose_targets

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
NUM_BLOCKS = 4
BATCH, LENGTH = 8, 128
RATES = (4e-3, 1e-2, 3e-2, 1e-1)  # of the blocks
PUBLISHED = (0.05, 0.001, 0.0001)  # share of a matrix that moves: at first, after four fifths of the steps, at last
# (share at first, after four fifths, at last), ω as a share of the rank
TERNARY = (
    (PUBLISHED, 0.75),
    ((0.05, 0.01, 0.0), 0.5),
    ((0.2, 0.04, 0.0), 0.5),
    ((0.2, 0.04, 0.0), 0.25),
    ((0.4, 0.1, 0.0), 0.5),
    ((0.4, 0.1, 0.0), 0.25),
    ((0.6, 0.2, 0.0), 0.25),
    ((0.4, 0.1, 0.0), 0.15),
)


class TernaryLinear(nn.Module):
    """A packed linear layer whose codes two ternary matrices move.

    Attributes:
        up: (out, rank), and down: (rank, in): entries of −1, 0 and 1, stored as floats.
        threshold: ω, in votes.
    """

    codes: Tensor
    scales: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, base: QuantizedLinear, rank: int, omega: float) -> None:
        super().__init__()
        codes = base.integers().float()  # (out, groups, size)
        self.register_buffer("codes", codes - 2 ** (base.bits - 1), persistent=False)
        self.register_buffer("scales", base.scales[..., None], persistent=False)
        self.register_buffer("lowest", torch.where(codes > 0, -1.0, 0.0), persistent=False)
        self.register_buffer("highest", torch.where(codes < 2**base.bits - 1, 1.0, 0.0), persistent=False)
        drawn = nn.init.kaiming_normal_(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.down = nn.Parameter(torch.sign(drawn) * (drawn.abs() > 0.75 * drawn.abs().mean()))
        self.threshold = omega * rank

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        votes = (self.up @ self.down).view_as(self.codes)
        moves = self.moves(votes)
        shift = (votes - self.threshold * moves).mean(-1, keepdim=True) / self.threshold
        straight = votes + (moves - votes).detach()
        return functional.linear(x, ((self.codes + straight + shift) * self.scales).flatten(1))

    @torch.no_grad()
    def moves(self, votes: Tensor) -> Tensor:
        """−1, 0 or 1 for each code, none beyond the ends of the grid."""
        decided = torch.sign(votes) * (votes.abs() > self.threshold)
        return torch.clamp(decided, self.lowest, self.highest)


class TernarySignSGD(torch.optim.Optimizer):
    """Moves entries with the largest gradients by one against their sign; "lr" is the share of entries that move."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                size = parameter.grad.abs()
                least = torch.quantile(size.flatten(), 1 - group["lr"])
                moved = (size > least) & (size > 1e-9)
                parameter.sub_(torch.sign(parameter.grad) * moved).clamp_(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--characters", type=int, default=60_000, help="Of held-out text.")
    parser.add_argument("--tries", type=int, default=len(TERNARY), help="Settings of a method to choose among.")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        text, held = shakespeare(options.data_dir, Path(scratch), options.characters)
        base, grid = options.data_dir / "tinystories656k-hf", BaseGrid(4, options.group_size, symmetric=True)

        @functools.cache
        def blocks(rate: float, seed: int) -> dict[str, Any]:
            return on_grid(base, text, held, Path(scratch) / "blocks", grid, options.steps, rate, seed)

        ground = prepared(base, text, held, options.steps)

        @functools.cache
        def votes(how: tuple[tuple[float, float, float], float], seed: int) -> dict[str, Any]:
            return ternary(ground, grid, *how, seed)

        print("| method | settings | trained | held-out loss | before | codes moved |")
        print("|---|---|---|---|---|---|")
        print(row("blocks on the grid", blocks, best(blocks, RATES[: options.tries]), options.seeds), flush=True)
        print(row("ternary, as published", votes, TERNARY[0], options.seeds), flush=True)
        print(row("ternary, best", votes, best(votes, TERNARY[: options.tries]), options.seeds), flush=True)


def best(method: Callable[[Any, int], dict[str, Any]], settings: Any) -> Any:
    """The setting of least held-out loss with the first seed."""
    return min(settings, key=lambda one: method(one, 0)["loss"])


def row(name: str, method: Callable[[Any, int], dict[str, Any]], setting: Any, seeds: int) -> str:
    """One method's table row, over all seeds."""
    runs = [method(setting, seed) for seed in range(seeds)]
    losses = [run["loss"] for run in runs]
    spread = f" ± {np.std(losses, ddof=1):.3f}" if seeds > 1 else ""
    moved, before = (float(np.mean([run[key] for run in runs])) for key in ("moved", "before"))
    trained = runs[0]["trained"]
    return f"| {name} | {setting} | {trained:,} | {np.mean(losses):.3f}{spread} | {before:.3f} | {moved:.1%} |"


def on_grid(
    base: Path, text: Path, held: Path, output: Path, grid: BaseGrid, steps: int, rate: float, seed: int
) -> dict[str, Any]:
    """Train blocks on the grid by the command that users have."""
    began = time.process_time()
    done = train(
        base, text, output, eval_data=held, eval_every=steps, max_steps=steps, batch_size=BATCH, max_length=LENGTH,
        num_blocks=NUM_BLOCKS, target_modules=PROJECTIONS, lr=rate, base_quantize="int4", group_size=grid.group_size,
        on_grid=True, seed=seed, dtype="float32", overwrite=True,
    )  # fmt: skip
    modules = Adapter.load(output).modules.values()
    moved = sum(np.count_nonzero(one.blocks) for one in modules) / sum(
        one.in_features * one.out_features for one in modules
    )
    first, last = done.evaluations[0]["eval_loss"], done.evaluations[-1]["eval_loss"]
    return said(
        "blocks", rate, seed, began, {"loss": last, "before": first, "moved": moved, "trained": done.parameters}
    )


def prepared(base: Path, text: Path, held: Path, steps: int) -> trial.Ground:
    """Model and data as the trainer reads them."""
    return trial.prepare(
        base, text, place=torch.device("cpu"), task="causal-lm", dtype="float32", epochs=1, max_steps=steps,
        max_length=LENGTH, eval_data=held, eval_fraction=0, batch_size=BATCH, grad_accumulation=1,
    )  # fmt: skip


def ternary(
    ground: trial.Ground, grid: BaseGrid, shares: tuple[float, float, float], omega: float, seed: int
) -> dict[str, Any]:
    """Train ternary adapters of about as many entries as the blocks have."""
    began = time.process_time()
    torch.manual_seed(seed)
    network, _ = ground.load()
    targets = choose_targets(network, PROJECTIONS)
    rank = equal_rank(network, targets, NUM_BLOCKS)
    pack_base(network, grid)
    for name in targets:
        replace_module(network, name, TernaryLinear(network.get_submodule(name), rank, omega))
    layers = [module for module in network.modules() if isinstance(module, TernaryLinear)]
    trained = [matrix for layer in layers for matrix in (layer.up, layer.down)]
    objective = Objective(network, False, ground.pad, ground.place, False)
    before = objective.evaluate(ground.held, BATCH)["eval_loss"]
    network.train()
    train_loop(
        TernarySignSGD(trained), batches=Batches(ground.items, BATCH, 1, seed), loss=objective.loss,
        targets=objective.targets, steps=ground.steps, seed=seed, clip=None,
        rate=lambda step: falling(shares, step / ground.steps),
    )  # fmt: skip
    loss = objective.evaluate(ground.held, BATCH)["eval_loss"]
    moves = [layer.moves((layer.up @ layer.down).view_as(layer.codes)) for layer in layers]
    moved = sum(int(one.count_nonzero()) for one in moves) / sum(one.numel() for one in moves)
    count = sum(matrix.numel() for matrix in trained)
    return said(
        "ternary", (shares, omega), seed, began, {"loss": loss, "before": before, "moved": moved, "trained": count}
    )


def falling(shares: tuple[float, float, float], done: float) -> float:
    """The share of entries that move when a part of the run is done: two straight lines that meet at four fifths."""
    first, knee, last = shares
    return first + (knee - first) * done / 0.8 if done < 0.8 else knee + (last - knee) * (done - 0.8) / 0.2


def said(name: str, setting: Any, seed: int, began: float, figures: dict[str, Any]) -> dict[str, Any]:
    """Print a run's figures on standard error."""
    shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{name}, {setting}, seed {seed}: {shown}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    main()
