"""Trials one after the other, or several at a time, each in a process with a GPU of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from typing import Any

import torch

from diablo_export.errors import InputError
from diablo_export.trainer.trial import Ground, prepare, trial

Cell = dict[str, Any]
_own: dict[str, Any] = {}  # of a worker process: its device, and what its trials share


def run_all(cells: Sequence[Cell], options: dict[str, Any], jobs: int | None) -> Iterator[tuple[Cell, Cell]]:
    """Yield each trial with its outcome, as they end.

    Args:
        cells: keyword arguments of `trial`.
        options: keyword arguments of `prepare`; `place` is the kind of device.
        jobs: trials at a time; None: as many as there are GPUs, one on a CPU.

    Raises:
        InputError: what a trial raised, or a process that was killed.
    """
    place = options["place"]
    gpus = torch.cuda.device_count() if place.type == "cuda" else 0
    jobs = min(jobs or max(1, gpus), len(cells))
    if jobs > 1:
        yield from _in_processes(cells, options, jobs, [f"cuda:{n % gpus}" if gpus else "cpu" for n in range(jobs)])
    elif cells:
        ground = prepare(**options)
        yield from ((cell, trial(ground, **cell)) for cell in cells)


def _in_processes(
    cells: Sequence[Cell], options: dict[str, Any], jobs: int, devices: Sequence[str]
) -> Iterator[tuple[Cell, Cell]]:
    context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
    free: Queue[str] = context.Queue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // jobs)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(free, threads))
    try:
        futures = {pool.submit(_work, options, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                f"one of {jobs} processes was ended from outside, perhaps for want of memory; finished trials are "
                "kept: go on with --resume and fewer --jobs"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(free: Queue[str], threads: int) -> None:
    """Begin a worker process: it leaves Ctrl-C to the first process, and ends when that does, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _own["device"] = torch.device(free.get())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(options: dict[str, Any], cell: Cell) -> Cell:
    if "ground" not in _own:
        _own["ground"] = prepare(**{**options, "place": _own["device"]})
    ground: Ground = _own["ground"]
    return trial(ground, **cell)
