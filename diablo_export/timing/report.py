"""What `bench` found, as tables for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diablo_export.output import new_file

if TYPE_CHECKING:
    from rich.console import RenderableType

SIZE = (10.0, 4.5)  # inches
DPI = 150
_GREY, _ORANGE, _BLUE = "#666666", "#d9822b", "#3b6ea8"
_COLORS = {"base-again": "#999999", "lora": _ORANGE, "empty-lora": _ORANGE, "merged": "#3d8f5f"}


def tables(report: dict[str, Any]) -> RenderableType:
    """A table for each length, and below it what was left out and why."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    parts: list[Any] = []
    for work in report["work"]:
        title = f"{work['name']}, {work['rounds']} rounds"
        table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        processor = any("processor_ratio" in each for each in work["variants"].values())
        columns = ["", "ms", "quartiles", "× base", "95 %", *(["processor", "95 %"] if processor else [])]
        for column in columns:
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, figures in work["variants"].items():
            table.add_row(name, *cells(figures))
        parts.append(table)
        parts += [escape(f"{name}: failed: {why}") for name, why in work["failed"].items()]
    for name, about in report["variants"].items():
        if "skipped" in about:
            parts.append(escape(f"{name}: not timed: {about['skipped']}"))
        elif about["parameters"]:
            parts.append(f"{name}: {about['parameters']:,} parameters, {about['bytes'] / 1e6:,.1f} MB")
    return Group(*parts)


def cells(figures: dict[str, Any]) -> list[str]:
    """A variant's row: median, quartiles, ratio and its interval; the same of processor time where it is known."""
    seconds = figures["seconds"]
    row = [milliseconds(seconds["median"]), f"{milliseconds(seconds['q1'])}–{milliseconds(seconds['q3'])}"]
    for kind in ("ratio", "processor_ratio"):
        if kind in figures:
            row += [f"{figures[kind]['median']:.3f}", f"{figures[kind]['low']:.3f}–{figures[kind]['high']:.3f}"]
    return row


def milliseconds(seconds: float) -> str:
    """With three digits or more."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(report: dict[str, Any], file: Path) -> None:
    """The ratios to the base with their intervals, a panel for each length; processor time where it is known."""
    from matplotlib.figure import Figure  # not pyplot, which would change where a notebook shows its own pictures

    names = [name for name in report["variants"] if any(name in work["variants"] for work in report["work"])]
    shown = [name for name in names if name != "base"]
    figure = Figure(figsize=SIZE, layout="constrained")
    panels = figure.subplots(1, len(report["work"]), sharey=True, squeeze=False)
    kind = "ratio"
    for axes, work in zip(panels[0], report["work"], strict=True):
        for row, name in enumerate(shown):
            if name not in work["variants"]:
                continue
            kind = "processor_ratio" if "processor_ratio" in work["variants"][name] else "ratio"
            found = work["variants"][name][kind]
            bars = [[found["median"] - found["low"]], [found["high"] - found["median"]]]
            color = _COLORS.get(name, _BLUE)
            filled = "white" if name.startswith("empty") else color
            axes.errorbar(
                [found["median"]], [row], xerr=bars, fmt="o", markersize=6, color=color, markerfacecolor=filled,
                capsize=3, linewidth=1.5,
            )  # fmt: skip
            axes.annotate(
                f"{found['median']:.3f}", (found["median"], row), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=8, color=color,
            )  # fmt: skip
        axes.axvline(1, color=_GREY, linewidth=1)
        axes.set_title(f"{work['name']} (base {milliseconds(work['variants']['base']['seconds']['median'])} ms)",
                       fontsize=10)  # fmt: skip
        axes.set_yticks(range(len(shown)), shown)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.margins(x=0.2)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    threads = report["environment"]["threads"]
    clock = "processor time" if kind == "processor_ratio" else "time"
    figure.supxlabel(f"{clock} as a multiple of the base, median and 95 % interval", fontsize=9)
    many = "onnxruntime's own number of threads" if threads is None else f"{threads} thread{'s' * (threads > 1)}"
    figure.suptitle(f"{Path(report['model']).name}, adapter {report['adapter']}, {many}", fontsize=11,
                    color=_GREY, parse_math=False)  # fmt: skip
    with new_file(file, overwrite=True) as work:
        figure.savefig(work, dpi=DPI, format="png")
