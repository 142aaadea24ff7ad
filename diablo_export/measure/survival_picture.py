"""A picture of what merges keep: module by method, the cosine of each module's output and its gain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.blockdiag import Array
from diablo_export.errors import InputError
from diablo_export.output import new_file

ENDINGS = (".png", ".svg")
_WORST = 0.5  # cosine at the dark end: less is no better
_OFF = 0.3  # of a gain from 1 at either end
_WRITTEN = 130  # cells of a panel: with more of them their numbers cannot be read


def check_file(file: str | Path) -> None:
    """Refuse a file that no picture can be written to.

    Raises:
        InputError: another ending, or no such folder.
    """
    path = Path(file)
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{file}: a picture ends in {' or '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{file}: its folder does not exist; make it first")


def draw(rows: Sequence[Mapping[str, Any]], file: str | Path, title: str) -> None:
    """Draw rows of a manifest's `survival.tried`, a column of panels each.

    Args:
        rows: `{"method", "gain", "cosine", "kl", "modules": {path: {"gain", "cosine"}}}`.
        file: to write, .png or .svg.
        title: above all of it.
    """
    from matplotlib.figure import Figure  # not pyplot, which would change where a notebook shows its own pictures

    leaves, layers = places(rows)
    wide, tall = max(1.7, 0.42 * len(layers) + 0.2), max(1.4, 0.34 * len(leaves))
    figure = Figure(figsize=(wide * len(rows) + 2.6, 2 * tall + 1.9), layout="constrained")
    axes = figure.subplots(2, len(rows), squeeze=False, sharex=True, sharey=True)
    for column, row in enumerate(rows):
        head = f"{row['method']}\nlogits: gain {row['gain']:.3f}\ncosine {row['cosine']:.3f}, KL {row['kl']:.2g}"
        axes[0][column].set_title(head, fontsize=9)
        for line, name in enumerate(("cosine", "gain")):
            image = _panel(axes[line][column], grid(row["modules"], leaves, layers, name), name)
            axes[line][column].set_xticks(range(len(layers)), layers, fontsize=7)
            axes[line][column].set_yticks(range(len(leaves)), leaves, fontsize=8)
            if column == len(rows) - 1:
                bar = figure.colorbar(image, ax=list(axes[line]), shrink=0.9, pad=0.01)
                bar.set_label(f"{name} of a module's output", fontsize=8)
                bar.ax.tick_params(labelsize=7)
    if layers != [""]:
        figure.supxlabel("layer", fontsize=9)
    figure.suptitle(title, fontsize=11, color="#666666", parse_math=False)
    with new_file(file, overwrite=True) as work:
        figure.savefig(work, dpi=150, format=Path(file).suffix[1:].lower())


def rows(survival: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a manifest's `survival` has to draw: each method that was tried, and the plan where there is one."""
    plan = survival.get("plan")
    return [*survival["tried"], *([] if plan is None else [{"method": "plan", **plan}])]


def places(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """What modules are called within a layer, and the layers' numbers, of all modules of these rows, in their order."""
    found = [place(name) for row in rows for name in row["modules"]]
    layers = sorted({layer for _, layer in found}, key=lambda layer: (not layer, int(layer or 0)))
    return list(dict.fromkeys(leaf for leaf, _ in found)), layers


def place(module: str) -> tuple[str, str]:
    """A module path as its name within its layer and the layer's number; a number of "" where it has none.

    `model.layers.3.self_attn.q_proj` is (`self_attn.q_proj`, `3`).
    """
    parts = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", module)
    return (parts[2], parts[1]) if parts else (module, "")


def grid(
    modules: Mapping[str, Mapping[str, float]], leaves: Sequence[str], layers: Sequence[str], figure: str
) -> Array:
    """One figure of each module, (leaves, layers); nan where there is no such module."""
    values: Array = np.full((len(leaves), len(layers)), np.nan)
    for name, one in modules.items():
        leaf, layer = place(name)
        values[leaves.index(leaf), layers.index(layer)] = one[figure]
    return values


def _panel(axes: Any, values: Array, figure: str) -> Any:
    """One method's modules: dark is lost; a gain may be off both ways."""
    limits = (_WORST, 1.0, "viridis") if figure == "cosine" else (1 - _OFF, 1 + _OFF, "RdBu")
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap=limits[2], aspect="auto", interpolation="nearest")
    axes.set_facecolor("#eeeeee")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values.size <= _WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                color = "black" if _is_light(image, value) else "white"
                axes.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=color)
    return image


def _is_light(image: Any, value: float) -> bool:
    red, green, blue, _ = image.cmap(image.norm(value))
    return bool(0.3 * red + 0.59 * green + 0.11 * blue > 0.5)
