"""Patches: what a merge changed, as a small file that turns the base into the merged model and back.

A patch is a zip archive: patch.json names every file of the merged model with size and SHA-256 before and after, and
member `<i>` is the difference of the i-th. It needs numpy alone: python -m diablo_export.patch apply BASE PATCH
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from diablo_export.console import log, progress
from diablo_export.difference import Advance, Content, content, write_difference, write_other
from diablo_export.errors import DiabloError, InputError, OutputError, PatchError, indented
from diablo_export.output import MANIFEST, REPORTS, new_file, new_folder, real
from diablo_export.patch_header import HEADER, Entry, Side, faults_said, lines, new_header, read, summary

_MODEL = "model.onnx"  # what a merge calls the graph, whatever the base calls it
_GENAI = "genai_config.json"  # and there too


def create(base: str | Path, merged: str | Path, output: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write what must change in `base` for it to be `merged`, byte for byte.

    Args:
        base: the folder that was merged into, or an ONNX file in it.
        merged: the folder that `merge` wrote.
        output: the patch file to write.
        overwrite: replace `output` if it exists.

    Returns:
        What `info` returns.

    Raises:
        InputError: no such folders, or nothing in which they differ. OutputError: `output` cannot be written.
    """
    pairs = _pairs(Path(base), Path(merged))
    total = sum(path.stat().st_size for _, path in pairs.values() if path)
    entries = []
    with (
        new_file(output, overwrite) as work,
        progress("Comparing", total) as advance,
        zipfile.ZipFile(work, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for number, (name, (old, new)) in enumerate(pairs.items()):
            with (
                _reading(old) as before,
                _reading(new) as after,
                archive.open(str(number), "w", force_zip64=True) as member,  # may be over 2 GiB
            ):
                found = write_difference(before, after, member, advance)
            entries.append(Entry(name, found[0] if old else None, found[1] if new else None, found[2]))
        if all(entry.before == entry.after for entry in entries):
            raise InputError(f"{merged}: is {base}, byte for byte; there is nothing to write a patch of")
        text = json.dumps(new_header(entries, total, Path(merged)), indent=1)
        archive.writestr(zipfile.ZipInfo(HEADER), text, zipfile.ZIP_DEFLATED)  # without the time: same in, same out
    return info(output)


def apply(
    base: str | Path, patch: str | Path, *, output: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Turn the base into the merged model.

    The new folder is written beside and renamed: the base is there until the merged model is, whole. Where that was
    done already, or a part of the files was changed by other means, what is left is done.

    Args:
        base: the folder that the patch was made for, or an ONNX file in it.
        patch: the file that `create` wrote.
        output: folder to write; None: changed in place.
        overwrite: replace `output` if it exists.

    Returns:
        What `info` returns, with `written`: the names of the files that were written.

    Raises:
        PatchError: the patch cannot be read, or is for other files, each of which is named.
        OutputError: the folder cannot be written, or there is no room.
    """
    return _turn(Path(base), Path(patch), output, overwrite, "before", "after")


def revert(
    merged: str | Path, patch: str | Path, *, output: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Turn the merged model into the base again; as `apply`, the other way round."""
    return _turn(Path(merged), Path(patch), output, overwrite, "after", "before")


def info(patch: str | Path) -> dict[str, Any]:
    """What a patch does: `{"files", "patch_bytes", "model_bytes", "share", "touched_groups", "adapters", …}`.

    Raises:
        PatchError: it cannot be read.
    """
    return summary(Path(patch), read(Path(patch))[0])


# ------------------------------------------------------------------------------------------------------- making one


def _pairs(base: Path, merged: Path) -> dict[str, tuple[Path | None, Path | None]]:
    """Per file of the merged model, by its name in the base's folder, where it is in both."""
    if not merged.is_dir():
        raise InputError(f"{merged}: no such folder; give the folder that merge wrote")
    folder = _folder(base)
    graphs = [base] if base.is_file() else sorted(folder.glob("*.onnx"))
    renamed = {_MODEL: graphs[0].name} if len(graphs) == 1 else {}
    pairs: dict[str, tuple[Path | None, Path | None]] = {}
    for path in _files(merged):
        name = path.relative_to(merged).as_posix()
        name = renamed.get(name, name)
        old = folder / name
        if name == _GENAI and _same_but_for(old, path, renamed):
            path = old
        pairs[name] = (old if old.is_file() else None), path
    if not any(old for old, _ in pairs.values()):
        raise InputError(f"{merged}: has no file that is in {folder} as well; is it a merge of that model?")
    for name in (MANIFEST, *REPORTS):
        if (folder / name).is_file():
            pairs.setdefault(name, (folder / name, None))
    return pairs


def _files(folder: Path) -> list[Path]:
    """The files of a folder, but hidden ones."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _same_but_for(old: Path, new: Path, renamed: Mapping[str, str]) -> bool:
    """Whether two JSON files differ in nothing but the names of files: the patch keeps the base's."""
    with contextlib.suppress(OSError, ValueError):
        text = new.read_text(encoding="utf-8")
        for name, before in renamed.items():
            text = text.replace(json.dumps(name), json.dumps(before))
        return bool(json.loads(text) == json.loads(old.read_text(encoding="utf-8")))
    return False


@contextlib.contextmanager
def _reading(file: Path | None) -> Iterator[IO[bytes]]:
    """A file, or nothing where there is none."""
    with file.open("rb") if file else io.BytesIO() as stream:
        yield stream


# -------------------------------------------------------------------------------------------------------- using one


def _turn(
    place: Path, patch: Path, output: str | Path | None, overwrite: bool, source: Side, target: Side
) -> dict[str, Any]:
    """Write the folder in which every file is as on the target side."""
    folder = _folder(place).resolve()
    goal = folder if output is None else real(output)
    if goal != folder and goal.is_relative_to(folder):
        raise OutputError(f"{output}: lies in the model's folder {folder}; choose another --output")
    header, entries = read(patch)
    report = summary(patch, header)  # before the folder is replaced: the patch may lie in it
    waiting = _waiting(folder, patch, entries, source, target)
    done = [entry for entry in entries if entry.before != entry.after and entry not in waiting.values()]
    if done and waiting:
        log.info("%d of %d files are done already: finishing", len(done), len(done) + len(waiting))
    if waiting or goal != folder:
        stale = set(REPORTS) - {entry.name for entry in entries}  # made since: of weights that will be others
        _write(folder, goal, patch, waiting, stale, overwrite, target)
    else:
        log.info("%s: is that already; nothing to do", folder)
    return {**report, "written": [entry.name for entry in waiting.values()]}


def _waiting(folder: Path, patch: Path, entries: Sequence[Entry], source: Side, target: Side) -> dict[int, Entry]:
    """The entries, by number, whose files are still as on the source side.

    Raises:
        PatchError: files that are as on neither side, all of them.
    """
    waiting, faults = {}, []
    sizes = [(folder / entry.name).stat().st_size if (folder / entry.name).is_file() else 0 for entry in entries]
    with progress("Checking", sum(sizes)) as advance:
        for number, entry in enumerate(entries):
            found = _found(folder / entry.name, entry, advance)
            if found == entry.side(target):
                continue
            waiting[number] = entry
            if found != entry.side(source) and not _may_be_any(entry):
                faults.append(f"{entry.name}: {_said(found)}, {_said(entry.side(source))} is wanted")
    if faults:
        raise PatchError(
            f"{folder}: is not the model that {patch} {'was made for' if source == 'before' else 'gives'}:\n"
            f"{indented(faults)}\nGive that model; if another patch was applied to it, revert that one first"
        )
    return waiting


def _may_be_any(entry: Entry) -> bool:
    """Whether what is there does not matter: a report that one of the sides has not, taken away or written whole."""
    return entry.name in REPORTS and None in (entry.before, entry.after)


def _found(file: Path, entry: Entry, advance: Advance) -> Content | None:
    """The content of a file; not hashed where the size says enough."""
    if not file.is_file():
        return None
    size = file.stat().st_size
    if size not in [side.bytes for side in (entry.before, entry.after) if side]:
        return Content(size, "")
    return content(file, advance)


def _write(
    folder: Path, goal: Path, patch: Path, waiting: dict[int, Entry], stale: set[str], overwrite: bool, target: Side
) -> None:
    """Write the new folder: what waits is made of its difference, all else but what is stale is linked or copied."""
    in_place, inside = goal == folder, _is_here(folder)
    if in_place and not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: is not writable; choose an --output, or change its permissions")
    names = {entry.name for entry in waiting.values()} | stale
    others = [path for path in sorted(folder.rglob("*")) if path.relative_to(folder).as_posix() not in names]
    wanted = {number: entry for number, entry in waiting.items() if entry.side(target)}
    needs = sum(side.bytes for entry in wanted.values() if (side := entry.side(target)))
    needs += 0 if in_place else sum(path.stat().st_size for path in others if path.is_file())
    with new_folder(goal, in_place or overwrite, needs) as work:
        for path in others:
            _keep(path, work / path.relative_to(folder), in_place)
        with progress("Writing", needs) as advance, faults_said(patch), zipfile.ZipFile(patch) as archive:
            for number, entry in wanted.items():
                with archive.open(str(number)) as difference:
                    _write_file(folder, work, entry, difference, target, advance)
        if in_place:
            shutil.copymode(folder, work)
    if in_place and inside:
        log.warning("the folder that you are in was replaced: cd %s", folder)


def _write_file(folder: Path, work: Path, entry: Entry, difference: IO[bytes], target: Side, advance: Advance) -> None:
    """Write one file of the new folder, and see that it is the right one."""
    wanted = entry.side(target)
    assert wanted is not None
    old, new = (folder / entry.name, work / entry.name)
    there = old if old.is_file() and not _may_be_any(entry) else None
    new.parent.mkdir(parents=True, exist_ok=True)
    with _reading(there) as stream, new.open("wb") as written:
        sizes = there.stat().st_size if there else 0, wanted.bytes
        hashed = write_other(stream, difference, written, sizes, advance)
    if hashed != wanted.sha256:
        raise ValueError(f"it does not give the {entry.name} that it names")
    if there:
        shutil.copymode(there, new)


def _is_here(folder: Path) -> bool:
    """Whether this process was started in the folder."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # in one that is no more
        return False


def _keep(path: Path, to: Path, in_place: bool) -> None:
    """Have what does not change in the new folder as well."""
    if path.is_symlink() and (in_place or not path.is_file()):
        to.symlink_to(os.readlink(path) if in_place else path.resolve())
    elif path.is_dir():
        to.mkdir()
    else:
        if in_place:  # the old folder goes, so a link is as good as a copy, where there are links
            with contextlib.suppress(OSError):
                os.link(path, to)
                return
        shutil.copy2(path, to)


def _folder(place: Path) -> Path:
    if place.is_file() and zipfile.is_zipfile(place):
        raise InputError(f"{place}: is a patch; the model comes first, then the patch")
    if not place.exists():
        raise InputError(f"{place}: no such folder; give the folder of the model")
    return place if place.is_dir() else place.parent


def _said(side: Content | None) -> str:
    if side is None:
        return "no file"
    return f"{side.bytes:,} bytes" + (f" with SHA-256 {side.sha256[:12]}…" if side.sha256 else "")


def main(arguments: Sequence[str]) -> int:
    """Apply, revert or look into a patch without the command line's own packages; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m diablo_export.patch")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("apply", "revert"):
        command = verbs.add_parser(verb)
        command.add_argument("model", type=Path)
        command.add_argument("patch", type=Path)
        command.add_argument("--output", type=Path)
        command.add_argument("--overwrite", action="store_true")
    verbs.add_parser("info").add_argument("patch", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.verb == "info":
            report = info(given.patch)
        else:
            turn = apply if given.verb == "apply" else revert
            report = turn(given.model, given.patch, output=given.output, overwrite=given.overwrite)
    except DiabloError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
