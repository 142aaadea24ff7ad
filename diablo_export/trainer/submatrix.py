"""A frozen linear layer with trainable sub-matrices anywhere in its weight, and places for them to lie in.

DiaBlo is the case of blocks along the diagonal. The others are what it is compared with: whether the diagonal matters,
and the published methods that train parts of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diablo_export.errors import InputError, indented
from diablo_export.trainer.layer import features
from diablo_export.trainer.model import replace_module

# Input channels (count, block_in) and output channels (count, block_out) of a module's sub-matrices.
Places = tuple[Tensor, Tensor]

# projections that write to the residual stream: their inputs are a layer's inner channels, other modules' outputs are
_INWARD = re.compile(r"(o_proj|out_proj|down_proj|c_proj|fc2|output\.dense)$")


class SubmatrixLinear(nn.Module):
    """y = base(x) + Σ x[inputs_n] · blocks_n, added to y[outputs_n].

    Attributes:
        base: the wrapped, frozen layer.
        blocks: (count, block_in, block_out), float32, zero at the start.
        inputs: (count, block_in): the input channels that each block reads.
        outputs: (count, block_out): the output channels that it writes to; blocks may share some.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, base: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        weight = base.requires_grad_(False).get_parameter("weight")
        self.base = base
        self.blocks = nn.Parameter(torch.zeros(len(inputs), inputs.shape[1], outputs.shape[1], device=weight.device))
        self.register_buffer("inputs", inputs.to(weight.device), persistent=False)
        self.register_buffer("outputs", outputs.to(weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at their layers' weights."""
        return self.base.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        y: Tensor = self.base(x)
        picked = x.flatten(0, -2)[:, self.inputs].transpose(0, 1)  # (count, tokens, block_in)
        branch = torch.bmm(picked, self.blocks.to(picked.dtype)).transpose(0, 1).flatten(1)  # (tokens, count·block_out)
        flat = y.reshape(len(branch), y.shape[-1])
        return flat.index_add(1, self.outputs.flatten(), branch.to(y.dtype)).view(y.shape)


def wrap_submatrices(model: nn.Module, places: dict[str, Places]) -> None:
    """Put zero sub-matrices into the weights at these module paths."""
    for name, (inputs, outputs) in places.items():
        replace_module(model, name, SubmatrixLinear(model.get_submodule(name), inputs, outputs))


def on_grid(inputs: Tensor, outputs: Tensor, sizes: tuple[int, int], num_blocks: int) -> Places:
    """The channels of blocks of a num_blocks × num_blocks grid, given by their positions in it, (count,) each."""
    ranges = [torch.arange(size).view(num_blocks, -1) for size in sizes]
    return ranges[0][inputs], ranges[1][outputs]


def permuted(model: nn.Module, targets: Sequence[str], num_blocks: int, seed: int) -> dict[str, Places]:
    """As DiaBlo, but input block n is paired with output block π(n), π drawn for each module."""
    sizes, generator = grid_sizes(model, targets, num_blocks), torch.Generator().manual_seed(seed)
    every = torch.arange(num_blocks)
    return {
        name: on_grid(every, torch.randperm(num_blocks, generator=generator), pair, num_blocks)
        for name, pair in sizes.items()
    }


def scattered(model: nn.Module, targets: Sequence[str], num_blocks: int, seed: int) -> dict[str, Places]:
    """As many blocks as DiaBlo has, anywhere in the grid: some channels meet several of them, others none."""
    sizes, generator = grid_sizes(model, targets, num_blocks), torch.Generator().manual_seed(seed)
    places = {}
    for name, pair in sizes.items():
        drawn = torch.randperm(num_blocks**2, generator=generator)[:num_blocks]
        places[name] = on_grid(drawn // num_blocks, drawn % num_blocks, pair, num_blocks)
    return places


def channels(model: nn.Module, targets: Sequence[str], num_blocks: int, seed: int) -> dict[str, Places]:
    """One in num_blocks of a layer's inner channels, all of their weights: S2FT (arXiv 2412.06289).

    Modules that read from the residual stream train rows of their weight (outputs), those that write to it columns
    (inputs); modules of one layer with equally many inner channels train the same ones. Drawn at random; in attention
    single channels, where the paper takes whole heads.
    """
    places = {}
    for name, (rows, columns) in grid_sizes(model, targets, num_blocks).items():
        inward = bool(_INWARD.search(name))
        inner, outer = (rows, columns) if inward else (columns, rows)
        layer = [int(number) for number in re.findall(r"\.(\d+)\.", name)[:1]]
        order = np.random.default_rng([seed, inner, *layer]).permutation(inner)
        drawn, every = torch.from_numpy(order[: inner // num_blocks])[None], torch.arange(outer)[None]
        places[name] = (drawn, every) if inward else (every, drawn)
    return places


def strongest(
    model: nn.Module, targets: Sequence[str], num_blocks: int, backward: Callable[[], None]
) -> dict[str, Places]:
    """The blocks of all grids with the largest mean absolute gradient, as many weights as DiaBlo's: SMT.

    After arXiv 2405.15525, with the gradients summed over warm-up batches at the base's own weights.

    Args:
        model: the frozen base.
        targets: module paths.
        num_blocks: of the grid on each weight.
        backward: adds the gradients of the warm-up batches to all parameters that require one.
    """
    sizes = grid_sizes(model, targets, num_blocks)
    linears = [model.get_submodule(name) for name in sizes]
    for linear in linears:
        linear.get_parameter("weight").requires_grad_(True)
    backward()
    scores = [_block_scores(linear, num_blocks) for linear in linears]
    model.zero_grad()
    for linear in linears:
        linear.requires_grad_(False)
    weight = torch.tensor([rows * columns // num_blocks**2 for rows, columns in sizes.values()])  # of one block
    order = torch.cat([score.flatten() for score in scores]).argsort(descending=True, stable=True)
    spent = weight.repeat_interleave(num_blocks**2)[order].cumsum(0)
    module, at = np.divmod(order[spent <= weight.sum() * num_blocks].numpy(), num_blocks**2)
    found = {name: torch.from_numpy(at[module == index]) for index, name in enumerate(sizes)}
    return {
        name: on_grid(blocks // num_blocks, blocks % num_blocks, sizes[name], num_blocks)
        for name, blocks in found.items()
        if len(blocks)
    }


def _block_scores(linear: nn.Module, num_blocks: int) -> Tensor:
    """Mean absolute gradient of each block, (blocks of inputs, blocks of outputs), on the CPU."""
    gradient = linear.get_parameter("weight").grad
    assert gradient is not None
    if isinstance(linear, nn.Linear):
        gradient = gradient.T  # (in, out), as a Conv1D stores it
    rows, columns = gradient.shape
    tiles = gradient.abs().reshape(num_blocks, rows // num_blocks, num_blocks, columns // num_blocks)
    return tiles.mean((1, 3)).cpu()


def grid_sizes(model: nn.Module, targets: Sequence[str], num_blocks: int) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each target.

    Raises:
        InputError: lists every module that num_blocks does not divide: these methods have no ragged blocks.
    """
    sizes = {name: features(model.get_submodule(name)) for name in targets}
    odd = [
        f"{name}: {rows} → {columns}"
        for name, (rows, columns) in sizes.items()
        if rows % num_blocks or columns % num_blocks
    ]
    if odd:
        raise InputError(
            f"num_blocks is {num_blocks}, which does not divide the sizes of {len(odd)} of {len(sizes)} target "
            "modules; methods other than diablo, lora, dora and full need a divisor:\n" + indented(odd, 10)
        )
    return sizes
