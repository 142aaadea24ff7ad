"""Output folders are the old one or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from diablo_export import output
from diablo_export.errors import OutputError

Get = Callable[..., Path]


def write(folder: Path, text: str, overwrite: bool = False) -> None:
    with output.new_folder(folder, overwrite) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text(text)


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", "one")
    assert (tmp_path / "deep" / "out" / "sub" / "file").read_text() == "one"
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~output._umask()


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()

    def fsync(handle: int) -> None:
        assert not (tmp_path / "out").exists()
        flushed.add(os.fstat(handle).st_ino)

    monkeypatch.setattr(output.os, "fsync", fsync)
    with output.new_folder(tmp_path / "out") as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").touch()
        (work / "link").symlink_to("nowhere")  # as in a hub's cache that was cleaned up
    assert flushed == {(tmp_path / "out" / name).stat().st_ino for name in (".", "sub", "sub/file")}


def test_an_existing_folder_is_kept_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(OutputError, match=r"out: exists already; .* or give --overwrite"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "one"


def test_of_two_runs_at_once_the_first_stays(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out: exists already"), output.new_folder(tmp_path / "out") as work:
        (work / "file").touch()
        write(tmp_path / "out", "the first")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "the first" and os.listdir(tmp_path) == ["out"]


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "all" / "model", "weights")
    (tmp_path / "link").symlink_to(tmp_path / "all")
    model, link = tmp_path / "all" / "model", tmp_path / "link"
    with pytest.raises(OutputError, match=r"model: is read and would be replaced; choose another --output"):
        output.keep_inputs(model, None, "an/id", model)
    with pytest.raises(OutputError, match=r"link: holds \S+file, which is read, and would be replaced"):
        output.keep_inputs(link, model / "sub" / "file")
    output.keep_inputs(model / "inside", model)
    output.keep_inputs(tmp_path / "all" / "other", model)


@pytest.mark.parametrize("verb", ["train", "sweep", "quantize", "merge", "export", "convert"])
def test_no_verb_replaces_what_it_reads(
    verb: str, tiny_model: Get, tiny_adapter: Get, run: Callable[..., Result], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "here" / "model").parent
    shutil.copytree(tiny_adapter("llama"), folder / "adapter")
    (folder / "data.txt").write_text("the cat sat on the mat\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    text = folder / "data.txt"
    given = {
        "train": ["--data", text], "sweep": ["--data", text, "--eval-data", text, "--methods", "diablo"],
        "quantize": [], "convert": [folder / "adapter"],
    }  # fmt: skip
    read = ["--model", folder / "model", *given.get(verb, ["--adapter", folder / "adapter"])]
    for place in (folder, folder / "model"):
        result = run(verb, *read, "--output", place, "--overwrite")
        assert result.exit_code == 2 and "and would be replaced; choose another --output" in result.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_all_of_it(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:  # systems without renameat2
        monkeypatch.setattr(output, "_exchange", lambda first, second: False)
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "stale").touch()
    write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "sub" / "file").read_text() == "two"
    assert os.listdir(tmp_path / "out") == ["sub"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path, to: Path) -> Path:
        raise OSError(errno.EBUSY, "Device or resource busy")

    write(tmp_path / "out", "one")
    monkeypatch.setattr(output, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", busy)  # as of a mount point
    with pytest.raises(OutputError, match="out: cannot be replaced: Device or resource busy; choose another --output"):
        write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "sub" / "file").read_text() == "one" and os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "one")
    assert (tmp_path / "out" / "sub" / "file").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(error), output.new_folder(tmp_path / "out", overwrite=True) as work:
        (work / "file").write_text("half")
        raise error
    assert (tmp_path / "out" / "sub" / "file").read_text() == "one"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(full: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), output.new_folder(tmp_path / "out"):
        raise OSError(full, os.strerror(full))
    assert os.listdir(tmp_path) == []


def test_a_file_larger_than_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a file grew past what this disk"), output.new_folder(tmp_path / "out"):
        raise OSError(errno.EFBIG, "File too large")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", ["empty", "full", "nowhere"])
def test_a_link_stays_and_what_it_leads_to_is_written(there: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    if there != "nowhere":
        (tmp_path / "disk" / "out").mkdir()
    if there == "full":
        (tmp_path / "disk" / "out" / "stale").touch()
        with pytest.raises(OutputError, match="out: exists already"):
            write(tmp_path / "out", "one")
    write(tmp_path / "out", "one", overwrite=there == "full")
    assert (tmp_path / "out").is_symlink() and sorted(os.listdir(tmp_path)) == ["disk", "out"]
    assert os.listdir(tmp_path / "disk") == ["out"] and os.listdir(tmp_path / "disk" / "out") == ["sub"]


def test_a_linked_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    with output.new_file(tmp_path / "out") as work:
        work.write_text("one")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "out").read_text() == "one"


def test_names_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long; choose another --output"):
        output.check_output(tmp_path / ("n" * 250))  # with what is added while it is written
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="a: links that lead in a circle"):
        output.check_output(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_too_little_room_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage(10, 5, 5_000_000))
    with pytest.raises(OutputError, match="about 6 MB will be written, 5 MB are free"):
        output.check_output(tmp_path / "out", needs=6_000_000)
    with pytest.raises(OutputError, match=r"about 5\.01 MB will be written, 5 MB are free"):
        output.check_output(tmp_path / "out", needs=5_010_000)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="exists and is a file"):
        write(tmp_path / "out", "one", overwrite=True)
    with pytest.raises(OutputError, match="cannot be made"):
        write(tmp_path / "out" / "below", "one")


def test_an_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match="not writable"):
        write(tmp_path / "out", "one")


KILLED = """
import sys, time
from diablo_export import output
with output.new_folder(sys.argv[1], overwrite=True) as work:
    (work / "file").write_text("half")
    print("filling", flush=True)
    time.sleep(60)
"""


def test_kill_9_leaves_the_old_folder_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "out"], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"filling\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / "sub" / "file").read_text() == "one"
    assert len(os.listdir(tmp_path)) == 2  # what was half-written lies beside it
    write(tmp_path / "out", "two", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_is_alive_keeps_its_folder(tmp_path: Path) -> None:
    with output.new_folder(tmp_path / "out") as first:
        (first / "file").touch()
        write(tmp_path / "out", "second")
        assert (first / "file").exists()
        (tmp_path / "out" / "sub" / "file").unlink()
        (tmp_path / "out" / "sub").rmdir()
    assert os.listdir(tmp_path) == ["out"]
    assert time.time() - (tmp_path / "out").stat().st_mtime < 60


INTERRUPTED = """
import shutil, sys
from diablo_export import output
remove, calls = shutil.rmtree, []
def interrupted(folder, **how):
    calls.append(folder)
    if len(calls) == 1:
        raise KeyboardInterrupt  # a Ctrl-C that arrives in the middle of the clean-up
    remove(folder, **how)
output.shutil.rmtree = interrupted
with output.new_folder(sys.argv[1], overwrite=True) as work:
    (work / "file").write_text("new")
"""


def test_an_interrupt_of_the_clean_up_itself_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, tmp_path / "out"], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


def test_a_new_file_appears_whole(tmp_path: Path) -> None:
    with output.new_file(tmp_path / "deep" / "out") as work:
        work.write_text("one")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out").read_text() == "one" and os.listdir(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o666 & ~output._umask()
    with output.new_file(tmp_path / "deep" / "out", overwrite=True) as work:
        work.write_text("two")
        assert (tmp_path / "deep" / "out").read_text() == "one"
    assert (tmp_path / "deep" / "out").read_text() == "two" and os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_the_old_file_and_nothing_else(error: type[BaseException] | OSError, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("one")
    with pytest.raises((OutputError, RuntimeError, KeyboardInterrupt)), output.new_file(tmp_path / "out", True) as work:
        work.write_text("half")
        raise error
    assert (tmp_path / "out").read_text() == "one" and os.listdir(tmp_path) == ["out"]


def test_a_file_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone, alive = (tmp_path / f".out.partial-{pid}-file" for pid in (int(done.stdout), os.getppid()))
    gone.touch()
    alive.touch()
    with pytest.raises(OutputError, match="out: exists already"), output.new_file(tmp_path / "out") as work:
        (tmp_path / "out").write_text("another's")
        with output.new_file(tmp_path / "out"):
            pass
    assert not work.exists() and sorted(os.listdir(tmp_path)) == [alive.name, "out"]
