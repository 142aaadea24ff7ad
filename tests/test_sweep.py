"""The sweep: the same loop as train, every trial once, kept when killed, several at a time, drawn and tabled."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from diablo_export.errors import DataError, InputError, OutputError
from diablo_export.manifest import file_xxh3
from diablo_export.trainer import sweep as sweep_module
from diablo_export.trainer.baselines import METHODS
from diablo_export.trainer.sweep import RESULTS, SETTINGS, cells, read_results, sweep
from diablo_export.trainer.sweep_report import table
from diablo_export.trainer.train import train
from tests.test_docs import ROOT, blocks

Folder = Callable[[str], Path]
RUN: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "grad_accumulation": 2, "max_length": 16, "eval_fraction": 0.1}
GRID: dict[str, Any] = {"methods": ["diablo", "lora"], "lr": [0.01, 0.03], "num_blocks": [4], **RUN}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.jsonl").write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 12}))
    labelled = [{"text": f"the {'cat' if n % 2 else 'dog'} sat", "label": n % 2} for n in range(16)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
    return folder


@pytest.fixture(scope="module")
def swept(tiny_model: Folder, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("swept") / "sweep"
    sweep(tiny_model("llama"), data / "text.jsonl", output, **GRID)
    return output


def outcomes(results: list[dict[str, Any]]) -> dict[str, float]:
    """Held-out losses by trial, which no clock touches."""
    return {json.dumps([r["method"], r["lr"], r["num_blocks"], r["seed"]]): r["eval_loss"] for r in results}


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])  # with dropout; with a fresh head to train
def test_a_trial_of_diablo_is_a_run_of_train(architecture: str, tiny_model: Folder, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**RUN, "eval_fraction": 0, "eval_data": data / "text.jsonl"}
    file = data / "text.jsonl"
    if architecture == "bert":
        file = data / "labels.jsonl"
        options |= {"task": "text-classification", "eval_data": file}
    model = tiny_model(architecture)
    done = train(model, file, tmp_path / "adapter", num_blocks=4, lr=0.02, seed=5, **options)
    results = sweep(
        model, file, tmp_path / "sweep", methods=["diablo"], lr=[0.02], num_blocks=[4], seeds=[5], **options
    )
    assert (results[-1]["eval_loss"], results[-1]["parameters"]) == (done.evaluations[-1]["eval_loss"], done.parameters)
    assert [result["method"] for result in results] == (["diablo"] if architecture == "bert" else ["base", "diablo"])
    if architecture == "bert":
        assert results[-1]["eval_accuracy"] == done.evaluations[-1]["eval_accuracy"]
    else:
        assert results[0]["eval_loss"] == done.evaluations[0]["eval_loss"]


def test_output_folder(swept: Path) -> None:
    assert sorted(path.name for path in swept.iterdir()) == ["results.jsonl", "sweep.json", "sweep.png", "table.md"]
    assert [path.name for path in swept.parent.iterdir()] == ["sweep"], "the sweep's own folder must be gone"
    results = read_results(swept / RESULTS)
    assert [(r["method"], r["lr"]) for r in results] == [
        ("base", None), ("diablo", 0.01), ("diablo", 0.03), ("lora", 0.01), ("lora", 0.03),
    ]  # fmt: skip
    assert all(result["eval_loss"] < results[0]["eval_loss"] for result in results[1:])
    assert results[3]["rank"] == 8 and results[1]["steps"] == 4
    picture = (swept / "sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert "| LoRA r = 8 |" in (swept / "table.md").read_text()


def test_every_method_runs_through_the_loop(tiny_model: Folder, data: Path, tmp_path: Path) -> None:
    options = {**RUN, "max_steps": 2, "eval_fraction": 0.3}
    found = sweep(
        tiny_model("bert"), data / "labels.jsonl", tmp_path / "sweep", methods=list(METHODS), lr=[0.01],
        num_blocks=[4], task="text-classification", gradient_checkpointing=True, **options,
    )  # fmt: skip
    assert [result["method"] for result in found] == list(METHODS)
    head = 2 * 64 + 2
    blocks = found[0]["parameters"] - head
    assert all(r["parameters"] == blocks + head for r in found if r["method"] in ("permuted", "random-block", "s2ft"))
    assert all(0 <= result["eval_accuracy"] <= 1 for result in found)


def test_grid_has_every_trial_once() -> None:
    found = cells(["diablo", "full"], [1e-3, 1e-2], [4, 8], [None, ["q_proj"]], [0, 1], with_base=True)
    assert [cell["method"] for cell in found].count("full") == 4  # 2 learning rates × 2 seeds: it has no blocks
    assert len(found) == 1 + 2 * 2 * 2 * 2 + 4
    assert found[0]["method"] == "base" and [cell["seed"] for cell in found[1:]] == [0] * 10 + [1] * 10


def test_targets_are_swept(tiny_model: Folder, data: Path, tmp_path: Path) -> None:
    found = sweep(
        tiny_model("llama"), data / "text.jsonl", tmp_path / "sweep", methods=["diablo"], lr=[0.01], num_blocks=[4, 8],
        target_modules=[["q_proj"], ["q_proj", "mlp.down_proj"]], **RUN,
    )  # fmt: skip
    rows = table(found).splitlines()
    assert [row.split(" | ")[0][2:] for row in rows[3:]] == [
        "DiaBlo N = 4, q_proj", "DiaBlo N = 4, q_proj+mlp.down_proj", "DiaBlo N = 8, q_proj",
        "DiaBlo N = 8, q_proj+mlp.down_proj",
    ]  # fmt: skip
    assert [result["parameters"] for result in found[1:]] == [2 * 1024, 2 * (1024 + 1536), 2 * 512, 2 * (512 + 768)]


def test_single_values_and_arrays_are_lists_too(tiny_model: Folder, data: Path, tmp_path: Path) -> None:
    alike: Any = {"methods": "diablo", "lr": np.logspace(-2, -2, 1), "num_blocks": 8, "seeds": np.arange(1)}
    found = sweep(tiny_model("llama"), data / "text.jsonl", tmp_path / "s", target_modules=["q_proj"], **alike, **RUN)
    assert [(r["lr"], r["num_blocks"], r["target_modules"], r["seed"]) for r in found[1:]] == [(0.01, 8, ["q_proj"], 0)]


# going on


def unfinished(swept: Path, output: Path, trials: int) -> Path:
    """The folder of a sweep for `output` that was killed after so many trials, in the middle of a line."""
    work = Path(f"{output}.sweep")
    work.mkdir()
    shutil.copyfile(swept / SETTINGS, work / SETTINGS)
    whole = (swept / RESULTS).read_bytes().splitlines(keepends=True)
    (work / RESULTS).write_bytes(b"".join(whole[:trials]) + b'{"method": "lora", "lr"')
    return work


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The method and learning rate of each trial that a sweep runs."""
    found: list[tuple[str, float]] = []
    run_all = sweep_module.run_all

    def remember(left: Any, *arguments: Any) -> Any:
        found.extend((cell["method"], cell["lr"]) for cell in left)
        return run_all(left, *arguments)

    monkeypatch.setattr(sweep_module, "run_all", remember)
    return found


def test_a_sweep_that_is_stopped_keeps_what_is_finished(
    tiny_model: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all = sweep_module.run_all

    def stop_after_one(*arguments: Any) -> Any:
        yield next(iter(run_all(*arguments)))
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "run_all", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny_model("llama"), data / "text.jsonl", tmp_path / "sweep", **GRID)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.sweep"]
    assert len(read_results(tmp_path / "sweep.sweep" / RESULTS)) == 1


def test_killed_sweep_goes_on(
    swept: Path, ran: list[Any], tiny_model: Folder, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file, output = tiny_model("llama"), data / "text.jsonl", tmp_path / "sweep"
    work = unfinished(swept, output, 3)
    with pytest.raises(
        OutputError, match=r"sweep.sweep: holds an unfinished sweep; go on with --resume, or start anew"
    ):
        sweep(model, file, output, **GRID)
    with caplog.at_level("INFO", "diablo_export"):
        results = sweep(model, file, output, resume=True, **GRID)
    assert ran == [("lora", 0.01), ("lora", 0.03)] and "3 of 5 trials are done already" in caplog.text
    assert outcomes(results) == outcomes(read_results(swept / RESULTS)) == outcomes(read_results(output / RESULTS))
    assert not work.exists()


def test_a_sweep_goes_on_with_its_own_settings_and_base_only(
    swept: Path, tiny_model: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file, output = tiny_model("llama"), data / "text.jsonl", tmp_path / "sweep"
    work = unfinished(swept, output, 3)
    with pytest.raises(InputError, match=r"(?s)started with other settings.*max_steps was 4, now it is 5"):
        sweep(model, file, output, resume=True, **{**GRID, "max_steps": 5})
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"(?s)with other settings.*base was"):
        patch.setattr(sweep_module, "file_xxh3", lambda file: file_xxh3(file)[::-1])  # trained anew at the same place
        sweep(model, file, output, resume=True, **GRID)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "tokenizer_config.json").write_text("{}")
    settings = json.loads((work / SETTINGS).read_text())
    (work / SETTINGS).write_text(json.dumps({**settings, "model": str(other)}))
    with pytest.raises(InputError, match=r"(?s)with other settings.*base was"):  # the same weights, other tokens
        sweep(other, file, output, resume=True, **GRID)


def test_a_finished_sweep_is_widened_by_what_it_lacks(
    swept: Path, ran: list[Any], tiny_model: Folder, data: Path, tmp_path: Path
) -> None:
    model, file = tiny_model("llama"), data / "text.jsonl"
    output, work = Path(shutil.copytree(swept, tmp_path / "sweep")), tmp_path / "sweep.sweep"
    with pytest.raises(OutputError, match="exists already"):
        sweep(model, file, output, **GRID)
    results = sweep(model, file, output, resume=True, **{**GRID, "methods": ["diablo"], "seeds": [0, 1]})
    assert ran == [("diablo", 0.01), ("diablo", 0.03)] and len(results) == 7
    assert read_results(output / RESULTS) == results

    shutil.copytree(output, work)  # killed after the output was in place, before this was removed
    ran.clear()
    assert sweep(model, file, output, resume=True, **GRID) == results and not ran
    assert not work.exists()
    results = sweep(model, file, output, overwrite=True, **{**GRID, "lr": [0.01], "max_steps": 2})
    assert len(ran) == len(results) == 3 and {result.get("steps", 2) for result in results} == {2}


def test_settings_with_results_are_not_written_again(tmp_path: Path) -> None:
    """A kill in the middle of that would leave results that nothing can go on from."""
    (tmp_path / RESULTS).write_text("{}\n")
    (tmp_path / SETTINGS).write_text('{  "max_steps": 4}')
    with sweep_module._workspace(tmp_path, {"max_steps": 4}):
        assert (tmp_path / SETTINGS).read_text() == '{  "max_steps": 4}'


@pytest.mark.parametrize("fault", ["bad data", "Ctrl-C"])
def test_a_sweep_begun_anew_keeps_the_old_results_until_it_has_one(
    fault: str, swept: Path, tiny_model: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, file = tmp_path / "sweep", tmp_path / "bad.jsonl"
    shutil.copytree(swept, output)
    shutil.copytree(swept, work := Path(f"{output}.sweep"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    file.write_text("{" if fault == "bad data" else (data / "text.jsonl").read_text())

    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    if fault == "Ctrl-C":
        monkeypatch.setattr("diablo_export.trainer.workers.trial", stop)
    with pytest.raises(DataError if fault == "bad data" else KeyboardInterrupt):
        sweep(tiny_model("llama"), file, output, overwrite=True, **GRID)
    assert {path: path.read_bytes() for path in before} == before and work.is_dir()


KILLED = """
import sys
from diablo_export.trainer.sweep import sweep
if __name__ == "__main__":
    import tests.test_sweep as t
    sweep(sys.argv[1], sys.argv[2], sys.argv[3], jobs=2, resume=True, **t.GRID)
"""


@pytest.mark.slow
def test_parallel_sweep_survives_a_kill_and_leaves_no_process(
    swept: Path, tiny_model: Folder, data: Path, tmp_path: Path
) -> None:
    script, output = tmp_path / "run.py", tmp_path / "sweep"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tiny_model("llama")), str(data / "text.jsonl"), str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    results = Path(f"{output}.sweep") / RESULTS
    until = time.monotonic() + 400
    while not (results.exists() and results.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it must be killed before it is done"
    while time.monotonic() < until:
        try:
            os.killpg(first.pid, 0)
        except ProcessLookupError:
            break  # its workers have ended, too
        time.sleep(0.1)
    else:
        os.killpg(first.pid, signal.SIGKILL)
        pytest.fail("the killed sweep left processes behind")
    before = len(read_results(results))
    subprocess.run(command, env=environment, check=True)
    found = read_results(output / RESULTS)
    assert before >= 1 and len(found) == 5
    # one thread or two add up in another order
    assert outcomes(found) == pytest.approx(outcomes(read_results(swept / RESULTS)), rel=1e-4)


# what it says


def test_a_run_that_diverges_is_a_result(
    tiny_model: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]
) -> None:
    arguments = [
        "sweep", "--model", tiny_model("llama"), "--data", data / "text.jsonl", "--output", tmp_path / "sweep",
        "--methods", "full", "--max-steps", 3, "--batch-size", 2, "--max-length", 16, "--eval-fraction", 0.1,
    ]  # fmt: skip
    result = run(*arguments, "--lr", "1e30")
    assert result.exit_code == 2 and "every trial diverged; go on with --resume and a lower --lr" in result.stderr
    result = run(*arguments, "--lr", "1e30,1e-3", "--resume")
    assert result.exit_code == 0, result.stderr
    assert "| full | " in result.stdout and "| 0.001 |" in result.stdout and "1e+30" not in result.stdout
    found = read_results(tmp_path / "sweep" / RESULTS)
    assert [("diverged" in r, r["lr"]) for r in found] == [(False, None), (True, 1e30), (False, 1e-3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["diablo", "adalora"]}, "--methods has 'adalora'; known are diablo, lora, dora, full, permuted"),
        ({"eval_fraction": 0}, "compares on held-out data: give --eval-data or --eval-fraction"),
        ({"lr": [1e-3, -1.0]}, "--lr is -1.0; it must be a number above 0"),
        ({"lr": []}, "--lr is empty; give one value at least"),
        ({"num_blocks": [0]}, "--num-blocks is 0; it must be a whole number, at least 1"),
        ({"jobs": 0}, "--jobs is 0; it must be at least 1"),
        ({"eval_fraction": 0, "eval_data": "absent.jsonl"}, "absent.jsonl: no such file; give a .jsonl or .txt file"),
        ({"max_length": 300}, "--max-length is 300, but the model has 256 positions"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tiny_model: Folder, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        sweep(tiny_model("llama"), data / "text.jsonl", tmp_path / "sweep", **{**GRID, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_does_not_fit_is_told_and_the_sweep_can_go_on(
    jobs: int, tiny_model: Folder, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="num_blocks is 5, which does not divide the sizes of 10 of 10"):
        sweep(
            tiny_model("llama"), data / "text.jsonl", tmp_path / "sweep", jobs=jobs,
            **{**GRID, "num_blocks": [5], "methods": ["smt"]},
        )  # fmt: skip
    work = tmp_path / "sweep.sweep"
    if jobs == 1:  # else the base may have been under way
        assert [result["method"] for result in read_results(work / RESULTS)] == ["base"]
    options = {**GRID, "methods": ["smt"], "lr": [0.01]}
    assert len(sweep(tiny_model("llama"), data / "text.jsonl", tmp_path / "sweep", resume=True, **options)) == 2


def test_command_line(run: Callable[..., Result], tiny_model: Folder, data: Path, tmp_path: Path) -> None:
    arguments = ["sweep", "--model", tiny_model("llama"), "--data", data / "text.jsonl", "--output", tmp_path / "s"]
    result = run(*arguments, "--lr", "1e-3,high")
    assert result.exit_code == 2 and "'1e-3,high' is not numbers with commas between" in result.stderr
    result = run(
        *arguments, "--lr", "1e-3, 1e-2", "--num-blocks", 4, "--methods", "diablo,permuted", "--max-steps", 2,
        "--target-modules", "q_proj,k_proj", "--eval-fraction", 0.1, "--max-length", 16, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(r["method"], r["lr"]) for r in found[1:]] == [
        ("diablo", 1e-3), ("diablo", 1e-2), ("permuted", 1e-3), ("permuted", 1e-2),
    ]  # fmt: skip
    assert found[1]["target_modules"] == ["q_proj", "k_proj"]


def test_the_page_runs(
    run: Callable[..., Result], tiny_model: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model("llama"))
    (tmp_path / "train.jsonl").symlink_to(data / "text.jsonl")
    ((_, text),) = blocks(ROOT / "docs" / "sweep.md")
    program, *arguments = text.removeprefix("$ ").split()
    result = run(*arguments, "--max-steps", 1, "--max-length", 32)
    assert program == "diablo-export" and result.exit_code == 0, result.stderr
    assert result.stdout == (tmp_path / "sweep" / "table.md").read_text()
    page = (ROOT / "docs" / "sweep.md").read_text()
    assert all(f"`{name}`" in page for name in METHODS)


def test_a_disk_that_fills_up(tiny_model: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"the disk is full .* finished trials stay"):
        patch.setattr(Path, "write_text", full)
        sweep(
            tiny_model("llama"),
            data / "text.jsonl",
            tmp_path / "out",
            lr=[1e-3],
            num_blocks=[4],
            eval_fraction=0.25,
            max_steps=1,
        )
    assert not any(tmp_path.iterdir()), "an empty sweep is none to go on with"
