"""What a patch says of itself, in its patch.json: every file of the model before and after, and whose it is."""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from diablo_export import __version__
from diablo_export.difference import Content
from diablo_export.errors import PatchError
from diablo_export.output import MANIFEST

FORMAT = "diablo-export patch"
FORMAT_VERSION = 1
HEADER = "patch.json"

Side = Literal["before", "after"]


@dataclass(frozen=True)
class Entry:
    """One file of the merged model, by its path in the base's folder; a side that is None has no such file."""

    name: str
    before: Content | None
    after: Content | None
    changed_bytes: int

    def side(self, side: Side) -> Content | None:
        """What the file is on this side."""
        return self.before if side == "before" else self.after


def is_patch(file: Path) -> bool:
    """Whether a file is an archive with a patch's header, whatever that says."""
    try:
        with zipfile.ZipFile(file) as archive:
            return HEADER in archive.namelist()
    except zipfile.BadZipFile:
        return False


def new_header(entries: Sequence[Entry], model_bytes: int, merged: Path) -> dict[str, Any]:
    """The header of a patch of these files, which says what the merge's manifest says."""
    manifest: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # a merge by other means has none
        manifest = json.loads((merged / MANIFEST).read_text(encoding="utf-8"))
    counts = [module["touched_groups"] for module in manifest.get("modules", []) if "touched_groups" in module]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "made_by": f"diablo-export {__version__}",
        "adapters": [adapter["name"] for adapter in manifest.get("adapters", [])],
        "touched_groups": sum(counts) or None,
        "model_bytes": model_bytes,
        "files": [asdict(entry) for entry in entries],
    }


def read(patch: Path) -> tuple[dict[str, Any], list[Entry]]:
    """A patch's header, as it is and as entries."""
    with faults_said(patch), zipfile.ZipFile(patch) as archive:
        header: dict[str, Any] = json.loads(archive.read(HEADER))
        made = header["format"], header["format_version"]
        if made == (FORMAT, FORMAT_VERSION):
            entries = [_entry(file) for file in header["files"]]
            return {**header, **_said_of(header), "files": [asdict(entry) for entry in entries]}, entries
    raise PatchError(
        f"{patch}: is a {made[0]} of version {made[1]}, this program reads a {FORMAT} of version {FORMAT_VERSION}; "
        "use the diablo-export that made it, or make it again"
    )


@contextlib.contextmanager
def faults_said(patch: Path) -> Iterator[None]:
    """What goes wrong while a patch is read is a PatchError."""
    try:
        yield
    except FileNotFoundError as error:
        raise PatchError(f"{patch}: no such file; give the file that diablo-export patch create wrote") from error
    except IsADirectoryError as error:
        raise PatchError(f"{patch}: is a folder; the model comes first, then the patch") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PatchError(f"{patch}: is no patch, or a broken one ({error}); copy it again, or make it again") from error


def _said_of(header: dict[str, Any]) -> dict[str, Any]:
    """What patch.json says for the reader, which may come from anywhere."""
    groups = header["touched_groups"]
    return {
        "adapters": [str(name) for name in header["adapters"]],
        "touched_groups": groups and int(groups),
        "model_bytes": int(header["model_bytes"]),
    }


def _entry(file: dict[str, Any]) -> Entry:
    """An entry of patch.json, which may come from anywhere."""
    path = PurePosixPath(file["name"])
    if path.is_absolute() or ".." in path.parts or not path.parts or set(str(path)) & set("\\:"):
        raise ValueError(f"{file['name']!r} lies outside of the model's folder")
    before, after = (
        side and Content(int(side["bytes"]), str(side["sha256"])) for side in (file["before"], file["after"])
    )
    return Entry(str(path), before, after, int(file["changed_bytes"]))


def summary(patch: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header, with what the patch itself weighs."""
    size = patch.stat().st_size
    return {**header, "patch_bytes": size, "share": size / max(1, header["model_bytes"])}


def lines(report: dict[str, Any]) -> list[str]:
    """What a person reads of `info`."""
    groups = report["touched_groups"]
    said = [
        f"{_size(report['patch_bytes'])}, {report['share']:.2%} of the model's {_size(report['model_bytes'])}"
        + (f"; {groups:,} touched groups" if groups else "")
        + (f"; adapter {', '.join(report['adapters'])}" if report["adapters"] else "")
    ]
    for file in report["files"]:
        sizes = [side and side["bytes"] for side in (file["before"], file["after"])]
        if file["before"] != file["after"]:
            what = "new" if sizes[0] is None else "removed" if sizes[1] is None else f"{file['changed_bytes']:,} bytes"
            said.append(f"  {file['name']:<40} {what}")
    return said


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
