"""ONNX graphs that the user names, with their external data read where links lead.

A hub's cache has links in place of files, a backup has files of several names: onnx_ir refuses both, as a graph from
anywhere could reach for any file so. Here the graph, and the names of its data in its own folder, are the user's word.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from diablo_export.errors import InputError

_TEXT = ("name", "op_type", "domain", "overload", "doc_string", "producer_name", "producer_version")


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
        InputError: external data that the graph looks for outside of its own folder, or text that is not UTF-8.
    """
    model = ir.load(file)
    _refuse_bytes(file, model)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = _Linked(tensor, _inside(file, Path(tensor.location)))
    return model


def _refuse_bytes(file: Path, model: ir.Model) -> None:
    """Refuse text that is not UTF-8: protobuf reads it as bytes, and would not write it again."""
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    nodes = [node for graph in graphs for node in graph]
    values = [value for graph in graphs for value in graph.inputs]
    values += [value for graph in model.graphs() for value in graph.initializers.values()]
    values += [value for node in nodes for value in node.outputs]
    for part in (model, *graphs, *nodes, *values):
        named = {field: getattr(part, field, None) for field in _TEXT}
        said = [*named.items(), *(("metadata_props", text) for pair in part.metadata_props.items() for text in pair)]
        for field, text in said:
            if isinstance(text, bytes):
                raise InputError(
                    f"{file}: the {field} {text!r} of a {type(part).__name__.lower()} is not UTF-8, as ONNX wants it; "
                    "export the model again with plain names"
                )


def _inside(file: Path, location: Path) -> Path:
    if location.is_absolute() or ".." in location.parts:
        raise InputError(
            f"{file}: has weights in {location}, outside of its own folder, where they are not read; put the file "
            "beside the graph and save it with that name"
        )
    return file.parent / location
