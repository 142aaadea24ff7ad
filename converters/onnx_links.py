"""ONNX graphs that the user names, with their external data read where links lead.

A hub's cache has links in place of files, a backup has files of several names: onnx_ir refuses both, as a graph from
anywhere could reach for any file so. Here the graph, and the names of its data in its own folder, are the user's word.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from diablo_export.errors import InputError


class _Linked(ir.ExternalTensor):
    """External data at a path that is not looked into further; it is written down as relative as it was."""

    def __init__(self, tensor: ir.ExternalTensor, path: Path) -> None:
        super().__init__(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
            doc_string=tensor.doc_string, metadata_props=tensor.metadata_props,
        )  # fmt: skip
        self._path = str(path)

    @property
    def path(self) -> str:
        """Where the data is."""
        return self._path


def load(file: Path) -> ir.Model:
    """Read a graph.

    Raises:
        InputError: external data that the graph looks for outside of its own folder.
    """
    model = ir.load(file)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = _Linked(tensor, _inside(file, Path(tensor.location)))
    return model


def _inside(file: Path, location: Path) -> Path:
    if location.is_absolute() or ".." in location.parts:
        raise InputError(
            f"{file}: has weights in {location}, outside of its own folder, where they are not read; put the file "
            "beside the graph and save it with that name"
        )
    return file.parent / location
