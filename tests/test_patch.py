"""Patches: base to merged and back, byte for byte, or nothing at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import Result

from diablo_export import patch
from diablo_export.adapter import Adapter
from diablo_export.converters.merge import merge
from diablo_export.converters.onnx_linears import linears
from diablo_export.errors import InputError, OutputError, PatchError

Get = Callable[..., Path]
Run = Callable[..., Result]
DATA = "model.onnx.data"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def base(patched: Path, tmp_path: Path) -> Path:
    """A copy of the base, with a file that is the user's own and a link."""
    folder = tmp_path / "device" / "base"
    shutil.copytree(patched / "base", folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "same.txt").symlink_to("notes/mine.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    return folder


@pytest.fixture
def update(patched: Path) -> Path:
    return patched / "update.patch"


def test_there_and_back(patched: Path, base: Path, update: Path) -> None:
    before = contents(base)
    report = patch.apply(base, update)
    assert {name: text for name, text in contents(base).items() if name not in ("notes/mine.txt", "same.txt")} == (
        contents(patched / "merged")
    )
    assert (base / "same.txt").is_symlink() and os.readlink(base / "gone.txt") == "nowhere"
    assert (base / "notes" / "mine.txt").read_text() == "mine"
    assert set(report["written"]) >= {DATA, "diablo_export.json", "parity.json"}
    assert not (base / "parity.json").exists()
    assert os.listdir(base.parent) == ["base"]
    patch.revert(base, update)
    assert contents(base) == before


def test_reports_that_were_made_since_do_not_stay(base: Path, update: Path) -> None:
    (base / "parity.json").write_text('{"made": "again"}')
    (base / "certificate.json").write_text("{}")
    patch.apply(base, update)
    assert not (base / "parity.json").exists() and not (base / "certificate.json").exists()
    for name in ("parity.json", "certificate.json", "certificate.npz"):
        (base / name).write_text('{"of": "the merge"}')
    patch.revert(base, update)
    assert (base / "parity.json").read_text() == "{}", "the one that the patch was made with"
    assert not list(base.glob("certificate*"))


def test_a_report_that_both_sides_have_must_be_of_one_of_them(patched: Path, base: Path, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(patched / "merged", tmp_path / "merged"))
    (merged / "parity.json").write_text('{"of": "the merge"}')
    patch.create(patched / "base", merged, tmp_path / "update.patch")
    (base / "parity.json").write_text('{"of": "another"}')
    refused(base, tmp_path / "update.patch", r"parity\.json: 17 bytes.*, 2 bytes with SHA-256 \S+ is wanted")


def test_permissions_stay(base: Path, update: Path) -> None:
    for path in (base, *(path for path in base.rglob("*") if path.is_file())):
        path.chmod(0o750 if path.is_dir() else 0o640)
    written = patch.apply(base, update)["written"]
    assert base.stat().st_mode & 0o777 == 0o750
    modes = {name: (base / name).stat().st_mode & 0o777 for name in written if (base / name).exists()}
    assert modes["model.onnx.data"] == 0o640, modes


def test_into_another_folder(patched: Path, base: Path, update: Path, tmp_path: Path) -> None:
    before = contents(base)
    patch.apply(base, update, output=tmp_path / "new")
    assert contents(tmp_path / "new") == {
        **contents(patched / "merged"), "notes/mine.txt": b"mine", "same.txt": b"mine",
    }  # fmt: skip
    assert (tmp_path / "new" / "gone.txt").is_symlink() and not (tmp_path / "new" / "same.txt").is_symlink()
    (tmp_path / "new" / "notes" / "mine.txt").write_text("another")  # a copy, no link
    assert contents(base) == before
    with pytest.raises(OutputError, match="new: exists already"):
        patch.apply(base, update, output=tmp_path / "new")
    with pytest.raises(OutputError, match="lies in the model's folder"):
        patch.apply(base, update, output=base / "new")
    patch.apply(base, update, output=tmp_path / "new", overwrite=True)


def test_twice_is_once(base: Path, update: Path, caplog: pytest.LogCaptureFixture) -> None:
    patch.apply(base, update)
    inode = (base / DATA).stat().st_ino
    with caplog.at_level("INFO", "diablo_export"):
        assert patch.apply(base, update)["written"] == []
    assert "is that already; nothing to do" in caplog.text
    assert (base / DATA).stat().st_ino == inode


def test_a_merge_touches_what_blocks_meet(patched: Path, tiny_adapter: Get) -> None:
    """Nothing moves in the data file, and every run lies in a weight of an adapted module."""
    old, new = ((patched / side / DATA).read_bytes() for side in ("base", "merged"))
    assert len(old) == len(new)
    changed = np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8)
    model = ir.load(patched / "base" / "model.onnx")
    manifest = json.loads((patched / "merged" / "diablo_export.json").read_text())
    assert len(manifest["modules"]) == len(Adapter.load(tiny_adapter("llama")).modules)
    nodes = {module["node"] for module in manifest["modules"]}
    for layer in linears(model):
        if layer.name not in nodes:
            continue
        for value in (layer.weight, layer.scales, layer.zero_points):
            tensor = value and value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                assert tensor.length is not None
                here = slice(tensor.offset or 0, (tensor.offset or 0) + tensor.length)
                assert changed[here].any()
                changed[here] = False
    assert not changed.any()


def test_its_size(patched: Path, update: Path) -> None:
    report = patch.info(update)
    groups = report["touched_groups"]
    manifest = json.loads((patched / "merged" / "diablo_export.json").read_text())
    assert groups == sum(module["touched_groups"] for module in manifest["modules"])
    assert report["model_bytes"] == sum(len(text) for text in contents(patched / "merged").values())
    with zipfile.ZipFile(update) as archive:
        number = next(i for i, file in enumerate(report["files"]) if file["name"] == DATA)
        packed = archive.getinfo(str(number)).compress_size
    # 32 codes of 4 bits and a float32 scale, and what finding them costs
    assert packed <= 1.3 * groups * 20
    again = update.with_name("again.patch")
    patch.create(patched / "base", patched / "merged", again)
    assert again.read_bytes() == update.read_bytes(), "the same patch, byte for byte"


def test_a_graph_of_another_name(patched: Path, tmp_path: Path, tiny_adapter: Get) -> None:
    """A merge calls the graph model.onnx; on the device it keeps its name."""
    shutil.copytree(patched / "base", tmp_path / "base")
    (tmp_path / "base" / "model.onnx").rename(tmp_path / "base" / "decoder.onnx")
    (tmp_path / "base" / "parity.json").unlink()
    merge(tmp_path / "base" / "decoder.onnx", tiny_adapter("llama"), tmp_path / "merged", method="rtn")
    patch.create(tmp_path / "base" / "decoder.onnx", tmp_path / "merged", tmp_path / "update.patch")
    patch.apply(tmp_path / "base" / "decoder.onnx", tmp_path / "update.patch")
    after, merged = contents(tmp_path / "base"), contents(tmp_path / "merged")
    assert after["decoder.onnx"] == merged["model.onnx"] and after[DATA] == merged[DATA] and "model.onnx" not in after


def test_differences_of_gigabytes(patched: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zipfile must be told beforehand of members over 2 GiB; here that limit is 1 kB."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    patch.create(base, patched / "merged", tmp_path / "update.patch")
    patch.apply(base, tmp_path / "update.patch")
    assert (base / DATA).read_bytes() == (patched / "merged" / DATA).read_bytes()


def test_in_the_folder_itself(
    patched: Path, base: Path, update: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copyfile(update, base / "update.patch")
    monkeypatch.chdir(base)
    assert DATA in patch.apply(".", "update.patch")["written"]
    assert f"the folder that you are in was replaced: cd {base}" in caplog.text
    with pytest.raises(FileNotFoundError):
        os.getcwd()
    patch.revert(base, update)
    assert (base / DATA).read_bytes() == (patched / "base" / DATA).read_bytes()


def test_hugging_face_folders(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "base")
    merge(tmp_path / "base", tiny_adapter("llama"), tmp_path / "merged")
    report = patch.create(tmp_path / "base", tmp_path / "merged", tmp_path / "update.patch")
    assert report["touched_groups"] is None
    patch.apply(tmp_path / "base", tmp_path / "update.patch")
    assert contents(tmp_path / "base") == contents(tmp_path / "merged")


# -------------------------------------------------------------------------------------------------- what goes wrong


def refused(base: Path, update: Path, match: str, verb: Callable[..., Any] = patch.apply) -> None:
    before = contents(base)
    with pytest.raises(PatchError, match=match):
        verb(base, update)
    assert contents(base) == before and os.listdir(base.parent) == [base.name]


def test_the_wrong_model(base: Path, update: Path) -> None:
    text = bytearray((base / DATA).read_bytes())
    text[100] ^= 1
    (base / DATA).write_bytes(text)
    (base / "tokenizer.json").write_text("{}")
    (base / "genai_config.json").unlink()
    refused(
        base, update, r"is not the model that .*update.patch was made for:\n(.*\n)+Give that model; if another patch"
    )
    with pytest.raises(PatchError) as raised:
        patch.apply(base, update)
    said = str(raised.value)
    assert f"{DATA}: {len(text):,} bytes with SHA-256" in said
    assert "tokenizer.json: 2 bytes, " in said and "genai_config.json: no file, " in said
    refused(base, update, r"is not the model that .*update.patch gives:", patch.revert)


def test_another_merge_is_not_the_base(patched: Path, base: Path, other_adapter: Get, tmp_path: Path) -> None:
    merge(patched / "base", other_adapter("llama"), tmp_path / "other", method="rtn")
    patch.create(patched / "base", tmp_path / "other", tmp_path / "other.patch")
    patch.apply(base, tmp_path / "other.patch")
    refused(base, patched / "update.patch", "if another patch was applied to it, revert that one first")
    patch.revert(base, tmp_path / "other.patch")
    patch.apply(base, patched / "update.patch")


@pytest.mark.parametrize("side", ["base", "merged"])
def test_a_folder_that_is_half_one_and_half_the_other(
    side: str, patched: Path, base: Path, update: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not what apply leaves behind, but what a copy of the merged folder that was broken off does."""
    shutil.copyfile(patched / "merged" / DATA, base / DATA)
    verb = patch.apply if side == "merged" else patch.revert
    with caplog.at_level("INFO", "diablo_export"):
        verb(base, update)
    assert "files are done already: finishing" in caplog.text
    assert {name: contents(base).get(name) for name in contents(patched / side)} == contents(patched / side)


def cut(update: Path, to: Path, size: int) -> Path:
    to.write_bytes(update.read_bytes()[:size])
    return to


def test_a_truncated_or_damaged_patch(base: Path, update: Path, tmp_path: Path) -> None:
    size = update.stat().st_size
    for left in (0, 100, size // 2, size - 1):
        refused(base, cut(update, tmp_path / "cut", left), "is no patch, or a broken one .*copy it again")
    text = bytearray(update.read_bytes())
    with zipfile.ZipFile(update) as archive:
        largest = max(archive.infolist(), key=lambda info: info.compress_size)
    begin = largest.header_offset + 60  # past the member's own header, which zipfile does not look at
    for at in np.linspace(begin, largest.header_offset + largest.compress_size, 7).astype(int):
        damaged = bytearray(text)
        damaged[at] ^= 0x10
        (tmp_path / "damaged").write_bytes(damaged)
        refused(base, tmp_path / "damaged", "is no patch, or a broken one")
    for bit in (0, 6):  # of every member's flags: encrypted, strongly so
        locked = bytearray(text)
        for entry in re.finditer(rb"PK\x01\x02", text):
            locked[entry.start() + 8] |= 1 << bit
        (tmp_path / "locked").write_bytes(locked)
        refused(base, tmp_path / "locked", "is no patch, or a broken one")
    refused(base, tmp_path / "nothing", "no such file; give the file that diablo-export patch create wrote")
    refused(base, tmp_path, "is a folder; the model comes first, then the patch")


def rewritten(update: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A patch with another patch.json."""
    with zipfile.ZipFile(update) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name == "patch.json":
                header = json.loads(text)
                change(header)
                text = json.dumps(header).encode()
            new.writestr(name, text)
    return to


def with_field(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({name: value})


def test_patches_of_others(base: Path, update: Path, tmp_path: Path) -> None:
    def with_file(**changes: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["files"][-1].update(changes)

    to = tmp_path / "other"
    newer = rewritten(update, to, lambda header: header.update(format_version=2, files="differently"))
    refused(base, newer, "is a diablo-export patch of version 2, this program reads a diablo-export patch of version 1")
    refused(base, rewritten(update, to, lambda header: header.pop("files")), "broken one")
    for name in ("../outside", "/etc/passwd", "C:\\x", "a/../../b", ""):
        refused(base, rewritten(update, to, with_file(name=name)), "lies outside of the model's folder")
    for name, value in {"model_bytes": "x", "touched_groups": "x", "adapters": 5}.items():
        refused(base, rewritten(update, to, with_field(name, value)), "is no patch, or a broken one")
    report = patch.info(update)
    wrong = next(file for file in report["files"] if file["name"] == DATA)["after"] | {"sha256": "0" * 64}
    number = next(i for i, file in enumerate(report["files"]) if file["name"] == DATA)
    lying = rewritten(update, to, lambda header: header["files"][number].update(after=wrong))
    refused(base, lying, f"it does not give the {DATA} that it names")
    with zipfile.ZipFile(to, "w") as archive:
        archive.writestr("something", "else")
    refused(base, to, "is no patch, or a broken one")


def test_a_full_disk(base: Path, update: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(base)

    def full(*arguments: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(patch, "write_other", full)
    with pytest.raises(OutputError, match="the disk is full"):
        patch.apply(base, update)
    monkeypatch.setattr(patch, "write_difference", full)
    with pytest.raises(OutputError, match="the disk is full"):
        patch.create(base, base, base.parent / "new.patch")
    assert contents(base) == before and os.listdir(base.parent) == ["base"]


def test_a_folder_that_cannot_be_written(base: Path, update: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    for folder in (base, base.parent):  # root may write anywhere, so the system's answer is given here
        monkeypatch.setattr(os, "access", lambda path, mode, no=folder: Path(path) != no and access(path, mode))
        with pytest.raises(OutputError, match=rf"{folder}: (is )?not writable"):
            patch.apply(base, update)
    assert os.listdir(base.parent) == ["base"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_in_between(share: float, patched: Path, base: Path, update: Path) -> None:
    """Killed while writing: the base is whole; again, and it is done, and nothing is left lying about."""
    before = contents(base)
    code = (
        "import sys, time; from diablo_export import difference, patch\n"
        "done = 0\n"
        "def slow(source, runs, target, sizes, advance):\n"
        "    if sizes[1] < 100_000: return difference.write_other(source, runs, target, sizes, advance)\n"
        f"    target.write(source.read(int(sizes[1] * {share}))); target.flush()\n"
        "    print('here', flush=True); time.sleep(60)\n"
        "patch.write_other = slow\n"
        "patch.apply(sys.argv[1], sys.argv[2])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(base), str(update)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert contents(base) == before
    assert len(os.listdir(base.parent)) == 2  # and a hidden folder
    patch.apply(base, update)
    assert (base / DATA).read_bytes() == (patched / "merged" / DATA).read_bytes()
    assert os.listdir(base.parent) == ["base"]


def test_what_cannot_be_created(patched: Path, tmp_path: Path) -> None:
    base, merged = patched / "base", patched / "merged"
    with pytest.raises(InputError, match="byte for byte; there is nothing to write a patch of"):
        patch.create(base, base, tmp_path / "p")
    with pytest.raises(InputError, match="nowhere: no such folder; give the folder that merge wrote"):
        patch.create(base, tmp_path / "nowhere", tmp_path / "p")
    with pytest.raises(InputError, match="nowhere: no such folder; give the folder of the model"):
        patch.create(tmp_path / "nowhere", merged, tmp_path / "p")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no file that is in .*empty as well; is it a merge of that model"):
        patch.create(tmp_path / "empty", merged, tmp_path / "p")
    (tmp_path / "p").write_text("old")
    with pytest.raises(OutputError, match=r"p: exists already; .* or give --overwrite"):
        patch.create(base, merged, tmp_path / "p")
    assert (tmp_path / "p").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["empty", "p"]
    with pytest.raises(OutputError, match="empty: is a folder; choose a file"):
        patch.create(base, merged, tmp_path / "empty")
