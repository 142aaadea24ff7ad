"""What follows each step of a run: the log, the bar, evaluation, checkpoints, and stopping on Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diablo_export.console import log
from diablo_export.output import full_disk_said
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.history import LOG, History, training_bar
from diablo_export.trainer.loop import Step
from diablo_export.trainer.objective import Objective
from diablo_export.trainer.state import CHECKPOINT, read_step
from diablo_export.trainer.tensorboard import event_files


@dataclass(frozen=True)
class Watch:
    """Called with each finished step."""

    objective: Objective
    held: Sequence[Encoded]  # held-out items; none: no evaluation
    batch_size: int
    steps: int
    eval_every: int
    save_every: int
    history: History
    show: Callable[[int, float, float], None]
    save: Callable[[int], None]
    interrupted: Callable[[], bool]

    def __call__(self, done: Step) -> None:
        """Log a step and do what is due after it.

        Raises:
            KeyboardInterrupt: the run was asked to stop; its checkpoint is written.
        """
        self.history.add(**vars(done))
        self.show(done.step, done.loss, done.tokens / done.seconds)
        last, stop = done.step == self.steps, self.interrupted()
        if last or done.step % self.eval_every == 0:
            self.evaluate(done.step)
        if not last and (stop or done.step % self.save_every == 0):
            self.save(done.step)
        if stop and not last:
            log.warning("stopped after step %d of %d; to go on: the same command with --resume", done.step, self.steps)
            raise KeyboardInterrupt

    def evaluate(self, step: int) -> None:
        """Evaluate on the held-out items, if there are any, and log it."""
        if self.held:
            values = self.objective.evaluate(self.held, self.batch_size)
            self.history.add(step=step, **values)
            accuracy = f", accuracy {values['eval_accuracy']:.4f}" if "eval_accuracy" in values else ""
            log.info("step %d of %d: held-out loss %.4f%s", step, self.steps, values["eval_loss"], accuracy)


@contextlib.contextmanager
def watching(
    work: Path,
    objective: Objective,
    held: Sequence[Encoded],
    save: Callable[[int, list[dict[str, Any]]], None],
    *,
    steps: int,
    start: int,
    records: list[dict[str, Any]],
    batch_size: int,
    eval_every: int | None,
    save_every: int | None,
    tensorboard: Path | None,
) -> Iterator[Watch]:
    """Keep the folder of an unfinished run, its log and its bar while a run goes on; yields what each step calls.

    Args:
        work: the folder; the first process writes there, and clears it away in the end.
        objective: that is evaluated.
        held: on these items.
        save: writes a checkpoint, given the step and the log.
        steps: of the run, of which `start` are done.
        start: see there.
        records: the log so far.
        batch_size: of an evaluation.
        eval_every: steps; None: a tenth of the run.
        save_every: steps; None: a tenth of the run, 25 at least.
        tensorboard: folder of its event files.
    """
    processes, tenth = objective.processes, math.ceil(steps / 10)
    first = processes.first
    with (
        workspace(work) if first else contextlib.nullcontext(),
        interrupts(processes.count > 1) as interrupted,
        training_bar(steps, start) as show,
        event_files(tensorboard if first else None, start) as also,
    ):
        history = History(work / LOG if first else Path(os.devnull), records, also)
        yield Watch(
            objective, held, batch_size, steps, eval_every or tenth, save_every or max(25, tenth), history, show,
            lambda step: save(step, history.records), lambda: processes.any(interrupted()),
        )  # fmt: skip


@contextlib.contextmanager
def interrupts(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C and SIGTERM until the step is done: yields whether one came. A second one stops at once.

    Args:
        patient: not so, because a launcher of several processes sends its own signal after the terminal's.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came and not patient:
            raise KeyboardInterrupt
        came.append(number)
        log.warning("stopping after this step…")

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """The folder of an unfinished run; it goes when the run is done, or ends without a checkpoint to resume from."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk_said(folder, "the last checkpoint stays, if there is one, to --resume from"):
            yield folder
    except BaseException as error:
        if not (folder / CHECKPOINT).exists():
            shutil.rmtree(folder, ignore_errors=True)
        elif isinstance(error, Exception):
            log.warning("%s keeps the checkpoint after step %d", folder, read_step(folder / CHECKPOINT))
        raise
    shutil.rmtree(folder, ignore_errors=True)
