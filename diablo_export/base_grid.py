"""The grid that a base's weights lay on while an adapter was trained: what adapter_config.json says of it.

Blocks that were trained beside int4 weights make up for these weights' own errors; on another grid, or on the float
base, they do so in vain.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from diablo_export.errors import AdapterError, InputError
from diablo_export.quantization import Float32, Quantized, check_layout, quantize

BITS = {"none": 0, "int8": 8, "int4": 4, "int2": 2}  # as --base-quantize spells them


@dataclass(frozen=True)
class BaseGrid:
    """The grid of every linear layer but a classifier's trained head."""

    bits: int
    group_size: int
    symmetric: bool  # no zero points
    on_grid: bool = False  # the blocks are whole steps of this grid: added to the codes, they give codes

    @classmethod
    def chosen(
        cls, quantize: str, group_size: int | None, asymmetric: bool | None, classifier: bool, on_grid: bool = False
    ) -> BaseGrid | None:
        """The grid that options ask for; None for a float base.

        Raises:
            InputError: a layout that MatMulNBits does not have, or options of a grid without one.
        """
        if quantize not in BITS:
            raise InputError(f"--base-quantize is {quantize!r}; it must be one of {', '.join(BITS)}")
        if quantize == "none":
            given = {"--on-grid": on_grid or None, "--group-size": group_size, "--asymmetric": asymmetric}
            if unused := [name for name, value in given.items() if value is not None]:
                raise InputError(f"{', '.join(unused)}: only a quantized base has a grid; give --base-quantize int4")
            return None
        size, zeros = usual(classifier, group_size, asymmetric)
        check_layout(BITS[quantize], size)
        return cls(BITS[quantize], size, not zeros, on_grid)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BaseGrid:
        """Read what `to_json` wrote.

        Raises:
            AdapterError: a field is missing, or no such layout exists.
        """
        try:
            found = cls(
                int(value["bits"]), int(value["group_size"]), bool(value["symmetric"]), bool(value.get("on_grid"))
            )
            check_layout(found.bits, found.group_size)
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(f"adapter_config.json: broken base_quantization ({error})") from error
        return found

    def to_json(self) -> dict[str, Any]:
        """As it stands in adapter_config.json under `base_quantization`."""
        return asdict(self)

    def quantize(self, weight: Float32) -> Quantized:
        """A weight (out_features, in_features) on this grid, as an export stores it."""
        return quantize(weight, self.bits, self.group_size, self.symmetric)

    @property
    def numbers(self) -> tuple[int, int, bool]:
        """Bits, group size and whether symmetric: the same for two grids that give the same weights."""
        return self.bits, self.group_size, self.symmetric

    def __str__(self) -> str:
        return described(*self.numbers)


def usual(classifier: bool, group_size: int | None = None, asymmetric: bool | None = None) -> tuple[int, bool]:
    """Group size and zero points where they were not asked for: 32 without for a decoder, 16 with for a classifier.

    A decoder's speed is that of reading its weights, and a group of 32 without zero point is the smallest that keeps a
    fine-tune. A classifier's margins are what int4 wears down: on SST-2 its int4 base leaves 0.96 of the fine-tune's
    effect with the decoder's grid and 0.985 with this one, for a thirtieth of the file: most of that is embeddings.
    """
    return group_size or (16 if classifier else 32), classifier if asymmetric is None else asymmetric


def described(bits: int, group_size: int, symmetric: bool) -> str:
    """A grid in words, by the options that make it; 0 bits is float."""
    return f"int{bits} in groups of {group_size}, {'' if symmetric else 'a'}symmetric" if bits else "float"
