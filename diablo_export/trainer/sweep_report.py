"""A sweep as a table and as a picture: held-out loss or accuracy against the learning rate, a line for each method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diablo_export.trainer.baselines import BASE

_NAMES = {
    "diablo": "DiaBlo", "lora": "LoRA", "dora": "DoRA", "full": "full", "permuted": "permuted pairs",
    "random-block": "random blocks", "smt": "SMT", "s2ft": "S2FT",
}  # fmt: skip
# distinguishable also without colour, by the markers
_COLORS = ("#3b6ea8", "#d9822b", "#7a5195", "#666666", "#3d8f5f", "#b8433f", "#c2a000", "#4fb0ae")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = ("-", "--", ":", "-.")
# How near to the best a learning rate must come to count as good: in loss (5 % of perplexity), and in accuracy.
NEAR = {"eval_loss": 0.05, "eval_accuracy": 0.01}


@dataclass(frozen=True)
class Line:
    """One method at one size on one set of targets, over learning rates and seeds."""

    name: str
    method: str
    results: list[dict[str, Any]]
    figure: str  # `eval_loss` or `eval_accuracy`

    @property
    def values(self) -> dict[float, list[float]]:
        """By learning rate in rising order, the figure of each seed; without learning rates that diverged at any."""
        lost = {result["lr"] for result in self.results if "diverged" in result}
        found: dict[float, list[float]] = {}
        for result in sorted(self.results, key=lambda result: (result["lr"], result["seed"])):
            if result["lr"] not in lost:
                found.setdefault(result["lr"], []).append(result[self.figure])
        return found

    @property
    def means(self) -> dict[float, float]:
        """By learning rate, the mean over seeds."""
        return {lr: statistics.fmean(values) for lr, values in self.values.items()}

    @property
    def best(self) -> float | None:
        """The learning rate with the best mean; None where all diverged."""
        means = self.means
        if not means:
            return None
        return (
            max(means, key=means.__getitem__) if self.figure == "eval_accuracy" else min(means, key=means.__getitem__)
        )

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the smallest or the largest of several, so that it may lie beyond."""
        rates = {result["lr"] for result in self.results}
        return len(rates) > 1 and self.best in (min(rates), max(rates))

    def flat(self) -> list[float]:
        """The learning rates around the best one whose mean is near its own (NEAR), without gaps."""
        best, means = self.best, self.means
        if best is None:
            return []
        good = [abs(mean - means[best]) <= NEAR[self.figure] + 1e-12 for mean in means.values()]
        rates, at = list(means), list(means).index(best)
        low = max((index + 1 for index in range(at) if not good[index]), default=0)
        high = min((index for index in range(at, len(rates)) if not good[index]), default=len(rates))
        return rates[low:high]


def lines(results: Sequence[dict[str, Any]]) -> list[Line]:
    """The lines of a sweep, in the order in which they first appear."""
    trained = [result for result in results if result["method"] != BASE]
    figure = "eval_accuracy" if any("eval_accuracy" in result for result in trained) else "eval_loss"
    several = len({str(result["target_modules"]) for result in trained if result["method"] != "full"}) > 1
    grouped: dict[str, list[dict[str, Any]]] = {}
    for result in trained:
        grouped.setdefault(label(result, several), []).append(result)
    return [Line(name, found[0]["method"], found, figure) for name, found in grouped.items()]


def label(result: dict[str, Any], with_targets: bool = False) -> str:
    """How a result's method and size are called, such as `DiaBlo N = 8` or `LoRA r = 5`."""
    name: str = _NAMES.get(result["method"], result["method"])
    if "rank" in result:
        name += f" r = {result['rank']}"
    elif result["num_blocks"]:
        name += f" N = {result['num_blocks']}"
    if with_targets and result["method"] != "full":
        name += f", {'+'.join(result['target_modules'] or ['default'])}"
    return name


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: per line its parameters, its best learning rate and figure there, and how flat that is.

    Below it, the lines whose best learning rate is not found yet.
    """
    found = lines(results)
    figure = found[0].figure
    what = figure.removeprefix("eval_")
    rows = [
        f"| method | parameters | best lr | held-out {what} | over seeds | lr within {NEAR[figure]} of it | step |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if result["method"] == BASE:
            rows.append(f"| base | 0 | – | {result[figure]:.4f} | – | – | – |")
    open_ended = ", ".join(line.name for line in found if line.at_edge)
    note = f"The best of the learning rates lies at their edge, and may lie beyond it: {open_ended}."
    return "\n".join([*rows, *(_row(line) for line in found), *(["", note] if open_ended else [])]) + "\n"


def _row(line: Line) -> str:
    best, flat, parameters = line.best, line.flat(), line.results[0]["parameters"]
    name = line.name.replace("|", r"\|")  # within a regular expression
    if best is None:
        return f"| {name} | {parameters:,} | – | diverged | – | – | – |"
    values = line.values[best]
    spread = f"{min(values):.4f} – {max(values):.4f}" if len(values) > 1 else "one"
    wide = f"{flat[0]:.3g} – {flat[-1]:.3g} (×{flat[-1] / flat[0]:.3g})" if len(flat) > 1 else f"{best:.3g} alone"
    step = statistics.median(result["step_seconds"] for result in line.results if "step_seconds" in result)
    mean = statistics.fmean(values)
    return f"| {name} | {parameters:,} | {best:.3g} | {mean:.4f} | {spread} | {wide} | {1000 * step:.0f} ms |"


def draw(results: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """The picture: mean over seeds as a line, their range as a band, a cross at the edge where a seed diverged."""
    from matplotlib.figure import Figure  # not pyplot, which would change where a notebook shows its own pictures

    found = lines(results)
    base = next((result[found[0].figure] for result in results if result["method"] == BASE), None)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for line, style in zip(found, _styles(found), strict=True):
        values, means = line.values, line.means
        axes.plot(list(means), list(means.values()), linewidth=2, markersize=6, label=line.name, **style)
        if any(len(each) > 1 for each in values.values()):
            low, high = ([pick(each) for each in values.values()] for pick in (min, max))
            axes.fill_between(list(values), low, high, color=style["color"], alpha=0.15, linewidth=0)
    _limit(axes, found, base)
    if base is not None:
        axes.axhline(base, color="#999999", linewidth=1, linestyle=":", label="base, untrained")
    _cross_out(axes, found)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("held-out accuracy" if found[0].figure == "eval_accuracy" else "held-out loss")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11, color="#666666", parse_math=False)
    for text in figure.legend(frameon=False, loc="outside right upper").get_texts():
        text.set_parse_math(False)  # a regular expression's dollar begins no formula
    figure.savefig(file, dpi=150)


def _styles(found: Sequence[Line]) -> list[dict[str, Any]]:
    """A colour and marker for each method, a dash for each of its sizes."""
    methods = list(dict.fromkeys(line.method for line in found))
    seen: dict[str, int] = {}
    styles = []
    for line in found:
        at, nth = methods.index(line.method) % len(_COLORS), seen.get(line.method, 0)
        seen[line.method] = nth + 1
        styles.append({"color": _COLORS[at], "marker": _MARKERS[at], "linestyle": _STYLES[nth % len(_STYLES)]})
    return styles


def _limit(axes: Any, found: Sequence[Line], base: float | None) -> None:
    """Leave out of sight what is far worse than the untrained base, or than every line's best: it squashes the rest."""
    if found[0].figure == "eval_accuracy":
        return
    means = [mean for line in found for mean in line.means.values()]
    best = min(means)
    worst = max([*(min(line.means.values()) for line in found if line.means), *([base] if base is not None else [])])
    top = min(max(means), worst + 0.1 * (worst - best))
    axes.set_ylim(best - 0.06 * (top - best or 1), top + 0.06 * (top - best or 1))


def _cross_out(axes: Any, found: Sequence[Line]) -> None:
    """A cross in the line's colour where its training diverged, at the edge on which bad values lie."""
    place = axes.get_xaxis_transform()  # x in data, y in parts of the height
    if any("diverged" in result for line in found for result in line.results):
        axes.plot([], [], "x", color="#999999", label="diverged at a seed")
    for row, (line, style) in enumerate(zip(found, _styles(found), strict=True)):
        lost = sorted({result["lr"] for result in line.results if "diverged" in result})
        edge = 0.03 * (row + 1) if line.figure == "eval_accuracy" else 1 - 0.03 * (row + 1)
        axes.plot(lost, [edge] * len(lost), "x", color=style["color"], transform=place, markersize=7)
