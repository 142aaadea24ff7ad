"""Which modules of a model get blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from diablo_export.blockdiag import BlockShape
from diablo_export.console import log
from diablo_export.errors import InputError, indented
from diablo_export.trainer.experts import is_experts
from diablo_export.trainer.layer import features, takes_blocks
from diablo_export.trainer.model import wrap

ALL = "all-linear"
# the paper's choice (its code calls it "qkvud"): no o_proj, no gate_proj
PAPER = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
_SHOWN = 20


def choose_targets(
    model: nn.Module, wanted: str | Sequence[str] | None = None, exclude: Collection[str] = ()
) -> list[str]:
    """Paths of the linear layers to adapt, in the model's order.

    Args:
        model: the base.
        wanted: `all-linear` (every linear layer of the transformer's blocks but those that choose among experts), or
            names: the end of a module's path, such as `q_proj` or `attention.output.dense`, or a regular expression
            for the whole path. None: the paper's q, k, v, up and down projections where the model has all of them,
            else `all-linear`.
        exclude: paths that cannot be adapted, such as a head that is trained whole.

    Raises:
        InputError: a name that matches nothing, with what exists, or a layer whose weight is tied to another module.
    """
    linear = [name for name in _read_by_text(model) if name not in exclude]
    routed = {name.rpartition(".")[0] for name, module in model.named_modules() if is_experts(module)}
    # the blocks are numbered; what stands beside experts chooses among them
    inside = [name for name in linear if re.search(r"\.\d+\.", name) and name.rpartition(".")[0] not in routed]
    if not wanted:
        leaves = {name.rpartition(".")[2] for name in inside}
        wanted = PAPER if leaves.issuperset(PAPER) else ALL
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    for name in names:
        found = inside if name == ALL else _matching(name, linear)
        if not found:
            raise InputError(
                f"target module {name!r} matches no linear layer; the model has:\n{_listing(linear)}\n"
                f"Give the end of a path, a regular expression for the whole path, or {ALL}"
            )
        chosen.update(found)
    _refuse_tied(model, chosen)
    return [name for name in linear if name in chosen]


def _read_by_text(model: Any) -> list[str]:
    """Paths of the linear layers that text comes to: where there are images too, the language model's and the head."""
    linear = [name for name, module in model.named_modules() if takes_blocks(module)]
    if not hasattr(getattr(model, "config", None), "vision_config"):
        return linear
    language, head = model.get_decoder(), model.get_output_embeddings()
    inside = next((name for name, module in model.named_modules() if module is language), "")
    return [name for name in linear if name.startswith(inside) or model.get_submodule(name) is head]


def short_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The last parts of the target paths where these name exactly the targets, else the whole paths."""
    leaves = {name.rpartition(".")[2] for name in targets}
    named = [
        name for name, module in model.named_modules() if takes_blocks(module) and name.rpartition(".")[2] in leaves
    ]
    return sorted(leaves) if set(named) == set(targets) else list(targets)


def wrap_targets(model: nn.Module, targets: Sequence[str], num_blocks: int) -> None:
    """Put `num_blocks` zero blocks beside each target, and warn where they leave outputs uncovered.

    Raises:
        InputError: `num_blocks` does not fit; lists every such module.
    """
    sizes = {name: features(model.get_submodule(name)) for name in targets}
    tight = [f"{name}: {i} → {o}" for name, (i, o) in sizes.items() if not 1 <= num_blocks <= min(i, o)]
    if tight:
        limit = min(min(pair) for pair in sizes.values())
        raise InputError(
            f"num_blocks is {num_blocks}, which {len(tight)} of {len(targets)} target modules cannot be cut into; "
            f"the largest that fits all is {limit}:\n{indented(tight, _SHOWN)}"
        )
    shapes = {name: BlockShape.for_linear(*pair, num_blocks) for name, pair in sizes.items()}
    open_ends = [
        f"{name}: {shape.covered_outputs} of {shape.out_features} outputs"
        for name, shape in shapes.items()
        if shape.covered_outputs < shape.out_features
    ]
    if open_ends:
        log.warning(
            "%d blocks do not reach every output of these modules; a num_blocks that divides their sizes would:\n%s",
            num_blocks, indented(open_ends, _SHOWN),
        )  # fmt: skip
    for name in targets:
        wrap(model, name, num_blocks=num_blocks)


def _matching(name: str, paths: Sequence[str]) -> list[str]:
    ending = [path for path in paths if path == name or path.endswith(f".{name}")]
    if ending:
        return ending
    try:
        return [path for path in paths if re.fullmatch(name, path)]
    except re.error as error:
        raise InputError(f"target module {name!r} is no module name and no regular expression ({error})") from error


def _refuse_tied(model: nn.Module, chosen: set[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    tied = [
        f"{name} with {', '.join(set(n) - {name})}" for n in owners.values() for name in n if name in chosen and n[1:]
    ]
    if tied:
        raise InputError(
            "these target modules share their weight with another module, which a merge would change too: "
            + "; ".join(tied)
        )


def _listing(paths: Sequence[str]) -> str:
    """Module paths with their layer numbers folded together, and how often each occurs."""
    counts: dict[str, int] = {}
    for path in paths:
        folded = re.sub(r"\.\d+\.", ".*.", path)
        counts[folded] = counts.get(folded, 0) + 1
    return indented((f"{path} ({count})" if count > 1 else path for path, count in counts.items()), _SHOWN)
