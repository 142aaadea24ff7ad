"""The paper's layer, written down from its formulas, and this trainer's: the same loss curve for a hundred steps.

y = x·W + x·blockdiag(D_1 … D_N): reshape x to (tokens, N, m1/N), one product with D (N, m1/N, m2/N), reshape to
(tokens, m2); D begins at zero and alone is trained (DiaBlo, arXiv 2506.03230).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_export.trainer.batches import Batches
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.loop import Step, learning_rate, train_loop
from diablo_export.trainer.model import load_base
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.targets import PAPER, choose_targets, wrap_targets

STEPS, BLOCKS, LENGTH, LR = 100, 4, 12, 0.01


class PaperLinear(nn.Module):
    """The paper's layer on a linear layer whose sizes N divides."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        d1, d2 = linear.in_features // BLOCKS, linear.out_features // BLOCKS
        self.blocks = nn.Parameter(torch.zeros(BLOCKS, d1, d2, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], BLOCKS, -1)
        branch = torch.einsum("btni,nio->btno", parts, self.blocks)
        return self.linear(x) + branch.flatten(-2)


def batches() -> Batches:
    random = np.random.default_rng(0)
    ids = random.integers(3, 40, (16, LENGTH)).astype(np.int32)  # few enough words to learn by heart
    return Batches([Encoded(row, np.ones(LENGTH, np.bool_)) for row in ids], batch_size=4, seed=1)


def paper_curve(folder: Path, dtype: str) -> list[float]:
    """Losses of AdamW on the paper's layers, in a loop of their own."""
    model, _ = load_base(folder, "causal-lm", dtype=dtype)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in PAPER:
            assert isinstance(module, nn.Linear)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PaperLinear(module))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        (batch,) = batches()(step)
        ids = torch.from_numpy(np.stack([item.ids for item in batch]).astype(np.int64))
        logits = model.train()(input_ids=ids).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def our_curve(folder: Path, dtype: str, fold: bool) -> list[float]:
    model, _ = load_base(folder, "causal-lm", dtype=dtype)
    wrap_targets(model, choose_targets(model), BLOCKS)
    layers = diablo_layers(model)
    if fold:
        fold_blocks(layers.values())
    goal = Objective(model.train(), False, 0, torch.device("cpu"), False)
    done: list[Step] = []
    train_loop(
        torch.optim.AdamW([layer.blocks for layer in layers.values()], weight_decay=0.01), batches=batches(),
        loss=goal.loss, targets=goal.targets, rate=learning_rate(LR, STEPS, 0, "linear"), steps=STEPS,
        after_step=done.append,
    )  # fmt: skip
    return [step.loss for step in done]


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[[str], Path]) -> list[float]:
    return paper_curve(tiny_model("llama"), "float32")


@pytest.mark.parametrize("fold", [False, True])
def test_loss_curve_is_the_papers(fold: bool, tiny_model: Callable[[str], Path], expected: list[float]) -> None:
    found = our_curve(tiny_model("llama"), "float32", fold)
    assert expected[-1] < expected[0] / 2, "it must learn something"
    # float32 in another order of sums, through a hundred steps of AdamW: 7e-6 was seen at most
    np.testing.assert_allclose(found, expected, rtol=5e-5)
