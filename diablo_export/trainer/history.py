"""The record of a run: training.jsonl while it goes, a loss curve when it is done, and the bar on the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.console import log, stderr

LOG, PICTURE = "training.jsonl", "loss.png"
_BLUE, _ORANGE, _GREEN, _GREY = "#3b6ea8", "#d9822b", "#3d8f5f", "#666666"


class History:
    """Records of a run, each appended to a JSON Lines file at once, so that a killed run leaves its log.

    A record is about one step: `{"step", "loss", "lr", "grad_norm", "tokens", "seconds"}`, or an evaluation after
    it: `{"step", "eval_loss"}`, and `eval_accuracy` for a classifier.
    """

    def __init__(
        self,
        file: Path,
        records: list[dict[str, Any]],
        also: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.records = records
        self.file = file
        self.also = also  # is given each new record, too
        write_log(file, records)  # what a killed run logged after its last checkpoint happens again

    def add(self, **record: Any) -> None:
        """Append one record."""
        self.records.append(record)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.also(record)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """The steps that have a value of this name, and the values."""
        found = [(record["step"], record[name]) for record in self.records if name in record]
        return [step for step, _ in found], [value for _, value in found]


def write_log(file: Path, records: list[dict[str, Any]]) -> None:
    """Write records as JSON Lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def draw(history: History, file: Path, title: str) -> None:
    """The loss curve as a picture: each step, a running mean, and the held-out loss (and accuracy)."""
    from matplotlib import ticker
    from matplotlib.figure import Figure  # not pyplot, which would change where a notebook shows its own pictures

    steps, losses = history.column("loss")
    held_steps, held = history.column("eval_loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, running_mean(losses), color=_BLUE, linewidth=2, label="training loss (running mean)")
    if held:
        label = f"held-out loss, {held[-1]:.3f} at last"
        axes.plot(held_steps, held, color=_ORANGE, marker="o", markersize=4, linewidth=2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_xlim(0, steps[-1] * 1.01)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    right_steps, right = history.column("eval_accuracy")
    handles, _ = axes.get_legend_handles_labels()
    if right:
        other = axes.twinx()
        label = f"held-out accuracy, {right[-1]:.3f} at last"
        handles += other.plot(right_steps, right, color=_GREEN, marker="s", markersize=4, linewidth=1.5, label=label)
        other.set_ylabel("accuracy", color=_GREEN)
        other.tick_params(axis="y", colors=_GREEN)
        other.spines[["top"]].set_visible(False)
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=3)
    axes.set_title(title, fontsize=11, color=_GREY, parse_math=False)  # dollars in a file's name begin no formula
    figure.savefig(file, dpi=150)


def running_mean(values: list[float]) -> list[float]:
    """Mean over the last twentieth of the run up to each step."""
    window = max(len(values) // 20, 1)
    sums = np.cumsum([0.0, *values])
    return [float(sums[end] - sums[max(end - window, 0)]) / min(window, end) for end in range(1, len(values) + 1)]


@contextlib.contextmanager
def training_bar(steps: int, start: int = 0) -> Iterator[Callable[[int, float, float], None]]:
    """A bar with loss, tokens per second and time left on a terminal; elsewhere a line for every tenth of the run.

    Yields `show(finished steps, loss, tokens per second)`.
    """
    console = stderr()
    if not console.is_terminal or log.getEffectiveLevel() > logging.INFO:
        yield lambda step, loss, speed: _say(step, steps, loss, speed)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("training", total=steps, completed=start, loss=float("nan"), speed=0.0)
        yield lambda step, loss, speed: bar.update(task, completed=step, loss=loss, speed=speed)


def _say(step: int, steps: int, loss: float, speed: float) -> None:
    if step == steps or step % max(steps // 10, 1) == 0:
        log.info("step %d of %d: loss %.3f, %s tokens/s", step, steps, loss, f"{speed:,.0f}")
