"""Training that is interrupted and goes on: to the very bits that it would have come to, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diablo_export.errors import CheckpointError, DataError, InputError, OutputError
from diablo_export.trainer import state
from diablo_export.trainer.history import History
from diablo_export.trainer.train import train
from diablo_export.trainer.watch import workspace
from tests import tiny
from tests.training import RUN, TEXT, log_of, same_weights, untimed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text(json.dumps({"text": TEXT * 12}) + "\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt2, which has dropout, trained by RUN."""
    output = tmp_path_factory.mktemp("uninterrupted") / "adapter"
    train(tiny_model("gpt2"), text, output, **RUN)
    return output


@pytest.mark.parametrize("stop_after", [2, 4, 7])  # in the first epoch, in the second, before the last step
def test_resumed_run_ends_in_the_same_bits(
    stop_after: int, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path, uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def add(self: History, **record: Any) -> None:
        original(self, **record)
        if record["step"] == stop_after and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    original, before = History.add, signal.getsignal(signal.SIGINT)
    output = tmp_path / "adapter"
    with monkeypatch.context() as patch:
        patch.setattr(History, "add", add)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_model("gpt2"), text, output, **RUN)
    assert f"stopped after step {stop_after} of 8; to go on: the same command with --resume" in caplog.text
    assert not output.exists() and signal.getsignal(signal.SIGINT) is before
    train(tiny_model("gpt2"), text, output, resume=True, **RUN)
    assert same_weights(output, uninterrupted)
    assert untimed(log_of(output)) == untimed(log_of(uninterrupted))


def test_layers_that_a_step_leaves_out_are_saved_and_resumed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32}
    config = transformers.OPTConfig(
        **sizes, num_hidden_layers=8, num_attention_heads=2, max_position_embeddings=64, layerdrop=0.5
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tiny.make_tokenizer(tmp_path / "opt")
    run = {**RUN, "eval_fraction": 0}
    work = stopped(tmp_path / "opt", text, tmp_path / "a", monkeypatch)  # after the first step
    assert work.exists()
    train(tmp_path / "opt", text, tmp_path / "a", resume=True, **run)
    train(tmp_path / "opt", text, tmp_path / "b", **run)
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_resume_without_a_checkpoint_starts_at_the_beginning(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "diablo_export"):
        train(tiny_model("gpt2"), text, tmp_path / "a", resume=True, **RUN)
    assert "a.training holds no checkpoint to resume from: beginning at the first step" in caplog.text
    assert same_weights(tmp_path / "a", uninterrupted)
    with pytest.raises(InputError, match="this run is finished already, there is nothing to resume"):
        train(tiny_model("gpt2"), text, tmp_path / "a", resume=True, **RUN)


KILLED = """
import os, signal, sys
from diablo_export import output
from diablo_export.trainer.train import train
from tests.training import RUN
calls = 0
def die(name):
    original = getattr(output, name)
    def wrapped(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments)
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(output, name, wrapped)
for name in ("_flush", "_move_into_place"):
    die(name)
train(sys.argv[1], sys.argv[2], sys.argv[4], resume=True, checkpoint_every=2, **RUN)
"""


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    output = tmp_path / "adapter"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # a folder is four moments: before and after its bytes are on the disk, before and after it is in place. Killed: in
    # the first checkpoint, in the second, after the third, in the adapter folder
    codes = []
    for moment in (3, 6, 8, 2, 0):
        command = [sys.executable, "-c", KILLED, tiny_model("gpt2"), text, str(moment), output]
        codes.append(subprocess.run(list(map(str, command)), env=environment, capture_output=True).returncode)
        assert output.exists() == (moment == 0)
    assert codes == [-signal.SIGKILL] * 4 + [0]
    assert same_weights(output, uninterrupted)
    assert untimed(log_of(output)) == untimed(log_of(uninterrupted))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def stopped(base: Path, data: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave an unfinished run with a checkpoint after step 1."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(History, "add", lambda self, **record: signal.raise_signal(signal.SIGINT))
        train(base, data, output, **{**RUN, "eval_fraction": 0})
    return Path(f"{output}.training")


def test_unfinished_run_is_not_lost_nor_mixed_up(
    tiny_model: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data, output = tiny_model("llama"), text, tmp_path / "adapter"
    work = stopped(base, data, output, monkeypatch)
    run = {**RUN, "eval_fraction": 0}
    with pytest.raises(
        OutputError, match=r"adapter.training: holds an unfinished run \(after step 1\); continue it with"
    ):
        train(base, data, output, **run)
    with pytest.raises(InputError, match="started with other settings") as error:
        train(base, data, output, resume=True, **{**run, "lr": 0.5, "seed": 4, "dtype": "bfloat16"})
    for was in ("lr was 0.02, now it is 0.5", "seed was 3, now it is 4", "autocast was false, now it is true"):
        assert was in str(error.value)
    with pytest.raises(InputError, match=r"base was .*, now it is"):
        train(tiny_model("qwen2"), data, output, resume=True, **run)
    (work / "checkpoint" / state.TENSORS).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        train(base, data, output, resume=True, **run)
    with pytest.raises(DataError, match="typo: cannot be read"):
        train(base, tmp_path / "typo", output, overwrite=True, **run)
    with pytest.raises(InputError, match="diverged and was stopped"):
        train(base, data, output, overwrite=True, **{**run, "lr": 1e30})
    assert state.unfinished(work), "a mistyped command, or one that fails at once, replaces nothing"
    train(base, data, output, overwrite=True, **run)
    assert output.exists() and not work.exists()


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer", "held out"])
def test_a_run_goes_on_with_nothing_else_than_it_began_with(
    what: str, tiny_model: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    stopped(base, text, tmp_path / "adapter", monkeypatch)
    how: dict[str, Any] = {**RUN, "eval_fraction": 0}
    if what == "weights":  # that no block lies beside
        network = transformers.AutoModelForCausalLM.from_pretrained(base)
        network.model.norm.weight.data += 0.1
        network.save_pretrained(base)
    elif what == "config":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    elif what == "tokenizer":
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.eos_token = "<s>"
        tokenizer.save_pretrained(base)
    else:
        how["eval_data"] = text
    name = {"tokenizer": "tokens", "held out": "eval_data"}.get(what, "base")
    with pytest.raises(InputError, match=f"(?s)started with other settings.*  {name} was [^\n]*, now it is"):
        train(base, text, tmp_path / "adapter", resume=True, **how)


def test_a_checkpoint_that_was_edited(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for version, message in (
        (state.FORMAT_VERSION, "has no usable step, log; start anew with --overwrite"),
        (1, "format_version is 1, not 2: another version of diablo-export began this run"),  # its warm-up was another
    ):
        (tmp_path / state.STATE).write_text(json.dumps({"format_version": version, "step": "7", "settings": {}}))
        with pytest.raises(CheckpointError, match=rf"state\.json: {message}"):
            state.load_state(tmp_path, {}, optimizer, {})


@pytest.mark.parametrize("names", [("a", "b"), ("a",), ("a", "b", "d")])
def test_a_checkpoint_of_other_parameters(names: tuple[str, ...], tmp_path: Path) -> None:
    def made(names: tuple[str, ...]) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in names}
        optimizer = torch.optim.AdamW(parameters.values())
        sum(value.sum() for value in parameters.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        return parameters, optimizer

    state.save_state(tmp_path / "c", *made(names), step=1, settings={}, log=[])
    assert state.load_state(tmp_path / "c", *made(names), {}) == (1, [])
    with pytest.raises(CheckpointError, match="holds other parameters than this run trains; start anew"):
        state.load_state(tmp_path / "c", *made(("a", "b", "c")), {})
    with pytest.raises(CheckpointError, match="holds other parameters than this run trains; start anew"):
        state.load_state(tmp_path / "c", *made(names[:-1] or ("e",)), {})


def test_settings_that_only_one_of_both_runs_has(tmp_path: Path) -> None:
    state.check_settings(tmp_path, {"lr": 1.0, "targets": ["q", "k"]}, {"lr": 1.0, "targets": ("q", "k")})  # as in JSON
    with pytest.raises(InputError, match=r"  repair_base was null, now it is true\n  task was .*, now it is null"):
        state.check_settings(tmp_path, {"lr": 1.0, "task": "causal-lm"}, {"lr": 1.0, "repair_base": True})


@pytest.mark.parametrize("kept", [False, True])
def test_a_disk_that_fills_up_between_checkpoints(kept: bool, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the disk is full .* the last checkpoint stays"), workspace(tmp_path / "a"):
        if kept:
            (tmp_path / "a/checkpoint").mkdir()
            (tmp_path / "a/checkpoint/state.json").write_text('{"step": 7}')
        raise OSError(errno.ENOSPC, "No space left on device")  # as of a line of the log
    assert (tmp_path / "a").exists() == kept
