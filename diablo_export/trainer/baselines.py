"""What DiaBlo is compared with, in the same loop: how each method's trainable parameters are put on a frozen model.

These exist to be compared with. Only DiaBlo's blocks become an adapter folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from diablo_export.errors import InputError, require
from diablo_export.trainer.layer import features
from diablo_export.trainer.submatrix import channels, permuted, scattered, strongest, wrap_submatrices
from diablo_export.trainer.targets import wrap_targets

METHODS = {
    "diablo": "blocks along the diagonal",
    "lora": "low-rank updates of as many parameters, by PEFT, alpha twice the rank",
    "dora": "LoRA with learned magnitudes, by PEFT",
    "full": "every weight of the model",
    "permuted": "DiaBlo's blocks, inputs and outputs paired at random",
    "random-block": "as many blocks, anywhere in the weight",
    "smt": "as many blocks, where warm-up gradients are largest (arXiv 2405.15525)",
    "s2ft": "as many weights, in whole inner channels (arXiv 2412.06289)",
}
BASE = "base"  # of a sweep: the model as it is, untrained


def adapt(
    network: nn.Module,
    method: str,
    targets: Sequence[str],
    num_blocks: int,
    *,
    seed: int = 0,
    backward: Callable[[], None] = lambda: None,
) -> dict[str, nn.Parameter]:
    """Put a method's trainable parameters on a frozen network, so that it computes what it did before.

    Args:
        network: frozen but for what every method trains, such as a classifier's head.
        method: one of METHODS.
        targets: paths of the linear layers to adapt; `full` trains everything.
        num_blocks: one in num_blocks of the targets' weights is trained; LoRA's rank follows from it.
        seed: of what is drawn at random.
        backward: for `smt`: adds up gradients over warm-up batches.

    Returns:
        everything that is trained, by name, in float32.

    Raises:
        InputError: unknown method, or a num_blocks that does not fit the targets.
    """
    if method == "diablo":
        wrap_targets(network, targets, num_blocks)
    elif method == "full":
        network.requires_grad_(True)
    elif method in ("lora", "dora"):
        _low_rank(network, targets, equal_rank(network, targets, num_blocks), dora=method == "dora")
    elif method == "smt":
        wrap_submatrices(network, strongest(network, targets, num_blocks, backward))
    elif method in METHODS:
        choose = {"permuted": permuted, "random-block": scattered, "s2ft": channels}[method]
        wrap_submatrices(network, choose(network, targets, num_blocks, seed))
    else:
        raise InputError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained


def equal_rank(network: nn.Module, targets: Sequence[str], num_blocks: int) -> int:
    """The rank, the same for all targets, with which LoRA has nearest to as many parameters as `num_blocks` blocks."""
    sizes = [features(network.get_submodule(name)) for name in targets]
    blocks = sum(rows * columns for rows, columns in sizes) / num_blocks
    return max(1, round(blocks / sum(rows + columns for rows, columns in sizes)))


def _low_rank(network: nn.Module, targets: Sequence[str], rank: int, dora: bool) -> None:
    require("peft", "peft")
    from peft import LoraConfig, inject_adapter_in_model

    # what was trainable before stays so: PEFT freezes everything but its own
    head = [parameter for parameter in network.parameters() if parameter.requires_grad]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), use_dora=dora)
    inject_adapter_in_model(config, network)
    for parameter in head:
        parameter.requires_grad_(True)
