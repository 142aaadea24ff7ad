"""Hugging Face checkpoints as streams of tensors: sharded safetensors, one tensor in memory at a time.

Files are read with plain reads, not a memory map: a map's touched pages count as the process's memory, and a
2 GB checkpoint is to be merged in a few hundred megabytes. The format is the one that
https://github.com/huggingface/safetensors specifies: 8 bytes of little-endian header length, the header in
JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array
from diablo_export.errors import CheckpointError, require

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"
_HEAD_STORED = "embed_out.weight"  # as GPT-NeoX checkpoints have it: transformers renames it on loading
# of text and images: how the names of the language model begin when loaded, and where Gemma 3, LLaVA, Qwen2-VL store it
_LANGUAGE = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "model."),
)
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")  # ends of their names
_MAX_HEADER = 100_000_000  # the safetensors library refuses longer headers too

# safetensors' dtype names, https://huggingface.co/docs/safetensors
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json with those of the part that reads text, which a model of images has by itself."""
    return {**config, **(config.get("text_config") or {})}


def decoder_class(config: Mapping[str, Any]) -> str:
    """transformers' auto class for a decoder with this config.json; a model of text and images is loaded whole."""
    return "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForCausalLM"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its file, its dtype and shape, and its byte range in that file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.stop - self.start

    def read(self) -> Array:
        """The tensor, in its stored dtype (bfloat16 as ml_dtypes.bfloat16).

        Raises:
            CheckpointError: the dtype is unknown, or the file ends early.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has dtype {self.dtype}; readable are {', '.join(DTYPES)}"
            )
        values = np.empty(self.shape, DTYPES[self.dtype])
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            if values.size and not fill(file, values.reshape(-1).view(np.uint8)):
                raise CheckpointError(f"{self.file}: ends inside tensor {self.name!r}; copy the file again")
        return values


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file and its `__metadata__`.

    Raises:
        CheckpointError: not a safetensors file, or truncated.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{file}: not a whole safetensors file ({size} bytes, of which the header claims {length}); "
                    "it was cut short or is another format; copy it again, or save it with safetensors"
                )
            entries = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not a safetensors file (its header is no JSON: {error})") from error
    metadata = entries.pop("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: not a safetensors file (its header, or that's __metadata__, is no JSON object)")
    base = 8 + length
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        try:
            start, stop = (base + int(offset) for offset in entry["data_offsets"])
            info = TensorInfo(name, file, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, stop)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} has a broken header entry {entry!r}") from error
        if start < base:
            raise CheckpointError(f"{file}: tensor {name!r} begins at byte {start - base} of the data; copy it again")
        if stop > size:
            raise CheckpointError(
                f"{file}: cut short: tensor {name!r} ends at byte {stop}, the file has {size}; copy it again"
            )
        expected = math.prod(info.shape) * DTYPES[info.dtype].itemsize if info.dtype in DTYPES else info.nbytes
        if info.nbytes != expected:
            raise CheckpointError(
                f"{file}: tensor {name!r} of {info.dtype} {list(info.shape)} takes {expected} bytes, "
                f"the header gives it {info.nbytes}"
            )
        tensors[name] = info
    return tensors, metadata


def header_bytes(layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """How a safetensors file of this `layout` (name → dtype name, shape) begins; the tensors follow in its order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start 8-byte aligned, as the library writes them
    return len(encoded).to_bytes(8, "little") + encoded


def write_safetensors(
    file: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Array]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to `file` as they come, in the order and dtypes of `layout` (name → dtype name, shape)."""
    with file.open("wb", buffering=0) as stream:
        stream.write(header_bytes(layout, metadata))
        for expected, (name, values) in zip(layout, tensors, strict=True):
            dtype, shape = layout[name]
            if name != expected or values.shape != shape or values.dtype != DTYPES[dtype]:
                raise ValueError(f"{name}: {values.dtype} {values.shape} was announced as {expected} {dtype} {shape}")
            _write_all(stream, values)


def _write_all(stream: Any, values: Array) -> None:
    if not values.size:
        return
    view = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    while len(view):
        view = view[stream.write(view) :]


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model folder: its config and where each tensor lies."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, dict[str, str]]  # per safetensors file name, its __metadata__

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a model folder, or a Hugging Face id from the local cache (or the hub, when online).

        Raises:
            CheckpointError: no such folder, no config.json, no safetensors, a missing or broken shard.
        """
        folder = resolve(model)
        config = read_json(folder / "config.json")
        files = _weight_files(folder)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, dict[str, str]] = {}
        for file in files:
            found, metadata[file.name] = read_header(file)
            tensors |= found
        index = folder / INDEX
        if SINGLE not in metadata:
            missing = set(_weight_map(index)) - set(tensors)
            if missing:
                raise CheckpointError(f"{index}: lists tensors that no shard holds: {', '.join(sorted(missing)[:5])}")
        return cls(folder, config, tensors, metadata)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in name order."""
        return [self.folder / name for name in sorted(self.metadata)]

    def find(self, name: str) -> TensorInfo | None:
        """The tensor of this parameter name, whatever base-model prefix the checkpoint was saved with.

        `bert.encoder.x` is also looked for as `encoder.x`, and `encoder.x` as `<one prefix>.encoder.x`.
        """
        if name in self.tensors:
            return self.tensors[name]
        if name == HEAD and _HEAD_STORED in self.tensors:
            return self.tensors[_HEAD_STORED]
        for loaded, stored in _LANGUAGE:
            if name.startswith(loaded) and (other := stored + name.removeprefix(loaded)) in self.tensors:
                return self.tensors[other]
        _, _, shorter = name.partition(".")
        if shorter in self.tensors:
            return self.tensors[shorter]
        longer = [stored for stored in self.tensors if stored.partition(".")[2] == name]
        return self.tensors[longer[0]] if len(longer) == 1 else None

    def weight_of(self, module: str) -> TensorInfo | None:
        """The weight of the module at this path; of a tied output head that is not stored, the input embeddings."""
        info = self.find(f"{module}.weight")
        if info is not None or not f"{module}.weight".endswith(HEAD):
            return info
        tables = [stored for stored in self if stored.name.endswith(EMBEDDINGS)]
        return tables[0] if len(tables) == 1 else None

    def has_own_head(self) -> bool:
        """Whether it stores an output head of other values than its input embeddings.

        transformers then keeps the two apart, whatever config.json says of ties.
        """
        head = self.find(HEAD)
        tables = [info for info in self if info.name.endswith(EMBEDDINGS)]
        if head is None or not tables:
            return False
        return not any(table.shape == head.shape and np.array_equal(table.read(), head.read()) for table in tables)

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())


def resolve(model: str | Path) -> Path:
    """The local folder of a model given as a folder or as a Hugging Face id.

    Raises:
        CheckpointError: neither a folder nor an id that can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    text = str(model)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model}: no such model folder; give a folder with config.json and *.safetensors, or a Hugging Face id"
        )
    hub = require("huggingface_hub", "train")
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(hub.snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds; all mean that it cannot be had
        raise CheckpointError(
            f"{model}: no such folder here, and not to be had as a Hugging Face id ({type(error).__name__}); "
            "check the spelling, or download it first"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; {file.parent} is not a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}, not an object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: the single one before an index, which an earlier save may have left there."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise CheckpointError(f"{index}: names shards that are not there: {', '.join(absent)}; download them again")
        return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" (only {', '.join(pickles)}, which are pickles and are not opened)" if pickles else ""
    raise CheckpointError(f"{folder}: holds no {SINGLE} or {INDEX}{hint}; save the model with safe_serialization=True")


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor name."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index}: its weight_map is no object of tensor names and files; download it again")
    return found


def fill(stream: IO[bytes], memory: npt.NDArray[np.uint8]) -> bool:
    """Read the next bytes of an unbuffered file to where they are held; False where it has fewer."""
    filled = 0
    while filled < memory.size:
        got: int = stream.readinto(memory[filled:].data)  # type: ignore[attr-defined]
        if not got:
            return False
        filled += got
    return True
