"""A model given as ONNX, a file or a folder: where it is, what belongs to it, and a copy of all that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diablo_export.converters import genai_config, genai_library
from diablo_export.converters.hf_folder import OTHER_WEIGHTS
from diablo_export.errors import InputError
from diablo_export.manifest import MANIFEST, file_xxh3, read_manifest
from diablo_export.output import REPORTS

if TYPE_CHECKING:  # it takes a second to load, and merges of Hugging Face folders have no use for it
    import onnx_ir as ir

MODEL = "model.onnx"
_WEIGHTS = (*OTHER_WEIGHTS, ".data", ".onnx_adapter")
# a folder with one of these is a model's, whatever its graph is called
_MARKS = ("config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json")
_BELOW = "onnx"  # where repositories of several formats keep their graphs, their config one folder up
_TEMPLATES = "additional_chat_templates"  # where tokenizers of several chat templates have all but the first


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model and the files that make it up."""

    file: Path  # the graph
    files: list[Path]  # the graph and its external data
    graph: ir.Model  # as it was read
    home: Path  # the folder of its config and tokenizer
    others: list[Path]  # these, and whatever else lies there

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.file.parent

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in [*self.files, *self.others])


def find(model: str | Path) -> OnnxModel | None:
    """The ONNX model that `model` names, or None where that is a Hugging Face folder or id.

    Raises:
        InputError: a folder of several ONNX files, none of them model.onnx; a file that is not ONNX; external
            data that is missing, too short, or not in its folder.
    """
    file = _graph_file(Path(model))
    if file is None:
        return None
    from diablo_export.converters.onnx_links import load

    try:
        graph = load(file)
    except InputError:
        raise
    except Exception as error:  # protobuf raises its own kinds
        raise InputError(f"{file}: cannot be read as ONNX ({type(error).__name__}); copy or export it again") from error
    if not len(graph.graph):
        raise InputError(f"{file}: holds a graph without nodes; copy or export it again")
    data = _data_files(file, graph)
    home = _home(file)
    return OnnxModel(file, [file, *data], graph, home or file.parent, _others(home, data) if home else [])


def _home(file: Path) -> Path | None:
    """The folder that is this graph's; None where the file may lie among strangers."""
    folder = file.parent.resolve()
    for place in (file.parent, folder.parent if folder.name == _BELOW else folder):
        if any((place / name).is_file() for name in _MARKS):
            return place
    return file.parent if file.name == MODEL else None


def _others(home: Path, data: list[Path]) -> list[Path]:
    """What lies in `home`, but weights, in whatever format, and what this program says of them."""
    beside = sorted([*home.iterdir(), *(home / _TEMPLATES).glob("*")])
    reports = {MANIFEST, *REPORTS}
    return [
        path
        for path in beside
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path not in data and path.name not in reports
    ]


def _graph_file(path: Path) -> Path | None:
    if path.is_file():
        if path.suffix != ".onnx":
            raise InputError(f"{path}: is a file; give a Hugging Face folder, an .onnx file, or a folder with one")
        return path
    if not path.is_dir() or next(path.glob("*.safetensors"), None):
        return None
    found = sorted(path.glob("*.onnx"))
    if path / MODEL in found:
        return path / MODEL
    if len(found) > 1:
        raise InputError(f"{path}: holds {', '.join(file.name for file in found)}; give one of these files")
    return found[0] if found else None


def _data_files(file: Path, graph: ir.Model) -> list[Path]:
    ends: dict[Path, int] = {}
    for tensor in _external(graph):
        data = file.parent / tensor.location
        ends[data] = max(ends.get(data, 0), (tensor.offset or 0) + (tensor.length or 0))
    for data, end in ends.items():
        size = data.stat().st_size if data.is_file() else None
        if size is None or size < end:
            state = "is missing" if size is None else f"has {size} bytes, the graph reads {end}"
            raise InputError(f"{data}: {state}; it holds weights of {file.name}; copy it again")
    return sorted(ends)


def copy(model: OnnxModel, folder: Path, data: bool = True) -> dict[str, str]:
    """Copy the model's files into `folder`, the graph as model.onnx; a library that they name is no longer named.

    Args:
        model: whose files.
        folder: where to.
        data: also those with its external data.

    Returns:
        The XXH3-128 of the graph and its data, by name.
    """
    hashes = {}
    for path in [*(model.files if data else [model.file]), *model.others]:
        inside = path.relative_to(model.folder if path in model.files else model.home)
        target = folder / (MODEL if path == model.file else inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in model.files:
            hashes[path.name] = file_xxh3(path, target)
        else:
            shutil.copyfile(path, target)
    genai_config.rename_graph(folder, model.file.name, MODEL)
    genai_library.drop(folder)
    return hashes


def refuse_adapted(model: OnnxModel) -> None:
    """Refuse a model that this program has put an adapter into.

    Raises:
        InputError: it says which.
    """
    if (model.folder / MANIFEST).exists():
        manifest = read_manifest(model.folder)
        names = ", ".join(str(entry.get("name")) for entry in manifest.get("adapters", []))
        raise InputError(
            f"{model.folder}: was made by diablo-export {manifest.get('command')} with the adapter {names}; "
            f"give the base that it was made from, {manifest.get('base', {}).get('path')}"
        )


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
