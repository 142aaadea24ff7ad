"""The grid that an output gets, and a word where adapters do not fit it: trained beside another one, or all zeros."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from diablo_export.adapter import Adapter
from diablo_export.base_grid import BITS, described, usual
from diablo_export.console import log

if TYPE_CHECKING:
    from diablo_export.converters.onnx_linears import Linear

Numbers = tuple[int, int, bool]  # bits, group size, symmetric; 0 bits is float
_FLOAT: Numbers = (0, 0, True)


def output_grid(
    adapters: Collection[Adapter], quantize: str, group_size: int | None, asymmetric: bool | None
) -> tuple[int, bool]:
    """Group size and zero points: as asked, else as the first adapter was trained on, else what suits the task."""
    first = next(iter(adapters))
    trained = first.base_grid
    if trained is not None and trained.bits == BITS.get(quantize):
        group_size = group_size or trained.group_size
        asymmetric = not trained.symmetric if asymmetric is None else asymmetric
    return usual(first.classifies, group_size, asymmetric)


def warn_of_another(adapters: Iterable[Adapter], found: Iterable[Numbers]) -> None:
    """Say which adapters were trained beside a quantized base whose numbers an output's base does not have.

    Args:
        adapters: those of the output.
        found: the grids of its base's linear layers.
    """
    grids = set(found)
    for adapter in adapters:
        trained = adapter.base_grid
        if trained is not None and grids != {trained.numbers}:
            log.warning(
                "the adapter %s was trained beside %s weights, and the base here is %s: what it learned of those "
                "weights' errors does not fit these. For the trained model: --quantize int%d --group-size %d "
                "--%ssymmetric",
                adapter.path, trained, ", ".join(described(*one) for one in sorted(grids)), trained.bits,
                trained.group_size, "" if trained.symmetric else "a",
            )  # fmt: skip


def warn_of(adapter: Adapter) -> None:
    """Say that an adapter changes nothing, and that nothing but sizes tells whether a model is its base."""
    if not adapter.saved and not any(module.blocks.any() for module in adapter.modules.values()):
        log.warning("the adapter %s: every block is zero, so that it changes nothing; was it trained?", adapter.path)
    unmarked = [name for name, module in adapter.modules.items() if module.fingerprint is None]
    if unmarked:
        log.warning(
            "the adapter %s: %d of %d modules carry no fingerprint of the weight that they were trained on, as when "
            "PEFT trained them on quantized layers: only their sizes tell whether this is their base",
            adapter.path, len(unmarked), len(adapter.modules),
        )  # fmt: skip


def numbers(quantize: str, group_size: int, asymmetric: bool) -> Numbers:
    """The grid that these options ask for."""
    return (BITS[quantize], group_size, not asymmetric) if BITS[quantize] else _FLOAT


def grids(layers: Iterable[Linear]) -> set[Numbers]:
    """The grids of an ONNX model's quantized layers, or float where it has none."""
    return {(one.bits, one.group_size, one.zero_points is None) for one in layers if one.bits} or {_FLOAT}
