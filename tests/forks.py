"""Trainings in processes of their own, forked from one that has imported everything: a start costs no second.

    python -m tests.forks together FILE    several processes train one model, are killed, and go on as others
    python -m tests.forks killed FILE      one process is killed at random moments, again and again

FILE is JSON: what the function of that name takes. A process that has forked nothing yet must run this (no threads).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from diablo_export.console import set_verbosity
from diablo_export.trainer.train import train

DEADLINE = 60.0  # seconds that one training may take on a machine that does much else


def together(runs: list[dict[str, Any]], log: str) -> None:
    """One training after the other, each by several processes.

    Args:
        runs: `count` processes, `environment` and `arguments` of each; `kill_after` this step, if given.
        log: what process r of run k says goes to <log>.<k>.<r>.
    """
    for k, run in enumerate(runs):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        count = run["count"]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true", **run.get("environment", {})}
        pids = [
            fork(run["arguments"], f"{log}.{k}.{rank}", shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        if "kill_after" in run:
            file = Path(f"{run['arguments']['output']}.training") / "training.jsonl"
            wait_for(lambda file=file, run=run: f'"step": {run["kill_after"]}, "loss"' in read(file), pids)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        expected = -signal.SIGKILL if "kill_after" in run else 0
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [expected] * count, (k, codes)


def killed(arguments: dict[str, Any], reference: str, kills: int, longest: float, seed: int, log: str) -> None:
    """Kill a training at `kills` random moments and resume it each time: whenever one ends, it is `reference`.

    Args:
        arguments: of `train`.
        reference: adapter folder of the uninterrupted training.
        kills: how many; a training that ends before them all is begun again.
        longest: seconds within which each kill comes.
        seed: of the moments.
        log: file for what is said.
    """
    moments, output = random.Random(seed), Path(arguments["output"])
    ended = 0
    while kills or not ended:
        pid = fork(arguments, log)
        if kills:
            time.sleep(moments.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), Path(log).read_text()
        if code:
            kills -= 1
            continue
        ended += 1
        ours, theirs = ((folder / "adapter_model.safetensors").read_bytes() for folder in (output, Path(reference)))
        assert ours == theirs, "the weights differ from those of the uninterrupted training"
        if kills:
            shutil.rmtree(output)


def fork(arguments: dict[str, Any], log: str, environment: dict[str, str] | None = None) -> int:
    """Start a training in a copy of this process; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment or {})
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        set_verbosity(20)
        if "DS_ACCELERATOR" in (environment or {}):
            _no_shared_memory()
        train(**arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _no_shared_memory() -> None:
    """Have DeepSpeed's processes speak over gloo: its own way over shared memory it would compile first."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def wait_for(condition: Any, pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise TimeoutError("the training did not come so far")
        time.sleep(0.01)


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


if __name__ == "__main__":
    {"together": together, "killed": killed}[sys.argv[1]](**json.loads(Path(sys.argv[2]).read_text()))
