"""The base model as a manifest names it: where it was, and what tells it from any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from diablo_export.manifest import base_sha256, file_xxh3


class Entry(Protocol):
    """Gives the base's manifest entry, once its files are hashed."""

    def __call__(self, known: Mapping[str, str] = ...) -> dict[str, Any]: ...  # noqa: D102


@contextmanager
def hashing(model: str | Path, folder: Path, files: Sequence[Path]) -> Iterator[Entry]:
    """Hash the base's weight files in a thread while the body works; yields what waits for its manifest entry.

    Args:
        model: the base as the user gave it, path or id.
        folder: where it is.
        files: its weight files; what is yielded takes the XXH3-128 of any others, by name.
    """
    with ThreadPoolExecutor(1) as thread:
        hashes = [(file.name, thread.submit(file_xxh3, file)) for file in files]

        def entry(known: Mapping[str, str] = {}) -> dict[str, Any]:
            known = {**known, **{name: future.result() for name, future in hashes}}
            return {"path": str(folder.resolve()), "id": str(model), "sha256": base_sha256(known), "files": known}

        try:
            yield entry
        finally:
            thread.shutdown(wait=False, cancel_futures=True)  # an interrupted run does not hash to the end first
