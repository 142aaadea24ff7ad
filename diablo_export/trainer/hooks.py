"""Hooks on the modules of a network that are there for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take these hooks off again at the end, however that comes."""
    found = list(handles)
    try:
        yield
    finally:
        for handle in found:
            handle.remove()
