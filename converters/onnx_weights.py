"""Weights from a checkpoint into model.onnx.data as a stream: a piece of one tensor in memory at a time.

Each job makes the bytes of one weight, in pieces: read some rows, add the adapter's blocks, transpose or quantize.
Two threads compute while the caller's thread writes and hashes, in order. Memory follows the largest tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from diablo_export.blockdiag import Array, add_to_weight
from diablo_export.checkpoint import DTYPE_NAMES, TensorInfo
from diablo_export.converters.rounding import gain_in
from diablo_export.errors import AdapterError, CheckpointError
from diablo_export.quantization import Float32, Quantized, quantize

DATA = "model.onnx.data"
_PIECE = 4 << 20  # weights per piece: 16 MB of float32
_THREADS = 2
_AHEAD = 4  # pieces computed before their turn; bounds memory at a few times _PIECE
_PAGE = 4096

Piece = Callable[[], tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a weight's values come from; its matrix is (out_features, in_features) as nn.Linear has it."""

    stored: TensorInfo | Array
    conv1d: bool = False  # the checkpoint stores it (in_features, out_features), as GPT-2 does
    blocks: Array | None = None  # (num_blocks, block_size_in, block_size_out), added on the way
    rows: tuple[int, int] | None = None  # only these output rows; None: all
    swapped: bool = False  # experts that are stored (experts, in_features, out_features)
    by_turns: bool = False  # of experts the rows of the first half (gate) and the second (up) by turns
    kept: dict[str, float] | None = None  # reading puts in it what float16 leaves of the blocks, as a manifest says it

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features) of a matrix, of the rows asked for; any shape of another tensor."""
        shape = self.stored.shape[::-1] if self.conv1d else self.stored.shape
        shape = (shape[0], shape[2], shape[1]) if self.swapped else shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    @property
    def dtype(self) -> str:
        """As safetensors spells the stored dtype."""
        return self.stored.dtype if isinstance(self.stored, TensorInfo) else DTYPE_NAMES[self.stored.dtype]

    def read(self, start: int | None = None, stop: int | None = None) -> Array:
        """Rows start to stop, or everything, in the stored dtype; float32 where blocks were added."""
        values = self._read(start, stop)
        values = values.swapaxes(1, 2) if self.swapped else values
        return by_turns(values) if self.by_turns else values

    def _read(self, start: int | None, stop: int | None) -> Array:
        first = self.rows[0] if self.rows else 0
        last = self.rows[1] if self.rows else (self.shape[0] if self.shape else 0)
        wanted = slice(first + (start or 0), last if stop is None else first + stop)
        if self.blocks is not None:
            weight = self._whole()
            if self.kept is not None and not self.kept:
                self.kept["weight_gain"] = gain_in(np.float16, weight, self.blocks)
            return add_to_weight(weight.astype(np.float32), self.blocks)[wanted]
        if isinstance(self.stored, TensorInfo) and not self.conv1d and self.shape:
            return _rows(self.stored, wanted).read()
        return self._whole()[wanted] if self.shape else self._whole()

    @property
    def in_pieces(self) -> bool:
        """Whether a few rows can be had without the rest."""
        return self.blocks is None and not self.conv1d

    def _whole(self) -> Array:
        values = self.stored.read() if isinstance(self.stored, TensorInfo) else self.stored
        return values.T if self.conv1d else values


@dataclasses.dataclass(frozen=True)
class Job:
    """The initializers of one weight and how to make them.

    `pieces` yields functions that each return one array per initializer; the first initializer is written piece
    by piece, the others (scales, zero points) are gathered and written after it.
    """

    initializers: tuple[ir.Value, ...]
    pieces: Callable[[], Iterator[Piece]]


def float_job(initializer: ir.Value, source: Source, transposed: bool) -> Job:
    """Write a weight as it is, in the initializer's dtype; `transposed`: matrices as (in_features, out_features)."""
    cast = functools.partial(_cast, initializer=initializer, source=source)

    def pieces() -> Iterator[Piece]:
        if transposed:  # strips of input columns: the target's rows
            weight = source.read()
            step = _step(weight.shape[0])
            for start in range(0, weight.shape[1], step):
                yield lambda strip=weight[:, start : start + step]: (cast(strip.T),)  # type: ignore[misc]
        elif source.in_pieces and len(source.shape) in (2, 3):
            step = _step(math.prod(source.shape[1:]))
            for start in range(0, source.shape[0], step):
                stop = min(start + step, source.shape[0])
                yield lambda start=start, stop=stop: (cast(source.read(start, stop)),)  # type: ignore[misc]
        else:
            yield lambda: (cast(source.read()),)

    return Job((initializer,), pieces)


def quantized_job(
    codes: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    source: Source,
    bits: int,
    group_size: int,
    by: Callable[[Float32], Quantized] | None = None,
) -> Job:
    """Write a weight as MatMulNBits takes it: codes, scales and, unless symmetric, zero points.

    `by` quantizes the whole weight at once; None: rounding to the nearest, a few rows at a time.
    """
    scale_dtype = _numpy_dtype(scales)

    def quantized(start: int, stop: int) -> tuple[Array, ...]:
        weight = source.read(start, stop).astype(np.float32)
        result = by(weight) if by else quantize(weight, bits, group_size, symmetric=zeros is None)
        parts: tuple[Array, ...] = (result.codes, result.scales.astype(scale_dtype, copy=False))
        if zeros is None or result.zero_points is None:
            return parts
        return (*parts, result.zero_points.astype(_numpy_dtype(zeros), copy=False))

    def pieces() -> Iterator[Piece]:
        out_features, in_features = source.shape
        step = _step(in_features) if source.in_pieces and by is None else out_features
        for start in range(0, out_features, step):
            yield lambda start=start: quantized(start, min(start + step, out_features))  # type: ignore[misc]

    return Job((codes, scales) if zeros is None else (codes, scales, zeros), pieces)


def write(
    folder: Path, jobs: Iterable[Job], advance: Callable[[float], None] = lambda amount: None, file_name: str = DATA
) -> str:
    """Run `jobs`, fill folder/model.onnx.data, point the initializers at it, and return its SHA-256.

    `advance` is called with the number of bytes after each write.

    Raises:
        CheckpointError: a source cannot be read, or is not of its initializer's size.
    """
    digest = hashlib.sha256()
    offset = 0
    with (folder / file_name).open("wb", buffering=0) as file, ThreadPoolExecutor(_THREADS) as threads:

        def put(values: Array | bytes) -> int:
            view = _bytes(values)
            digest.update(view)
            written = 0
            while written < len(view):
                written += file.write(view[written:])
            advance(len(view))
            return len(view)

        for job, results in _in_order(jobs, threads):
            gathered: list[list[Array]] = [[] for _ in job.initializers[1:]]
            start = offset = offset + put(bytes(_padding(offset)))
            for first, *others in results:
                offset += put(first)
                for parts, part in zip(gathered, others, strict=True):
                    parts.append(part)
            _point(job.initializers[0], folder, file_name, start, offset - start)
            for initializer, parts in zip(job.initializers[1:], gathered, strict=True):
                start = offset = offset + put(bytes(_padding(offset)))
                offset += put(np.concatenate(parts))
                _point(initializer, folder, file_name, start, offset - start)
    return digest.hexdigest()


def _in_order(jobs: Iterable[Job], threads: ThreadPoolExecutor) -> Iterator[tuple[Job, Iterator[tuple[Array, ...]]]]:
    """Each job with its finished pieces, in order, while later pieces (also of later jobs) are being computed."""
    waiting: deque[tuple[Job, Future[tuple[Array, ...]]]] = deque()
    source = ((job, piece) for job in jobs for piece in job.pieces())

    def refill() -> None:
        while len(waiting) < _AHEAD and (entry := next(source, None)) is not None:
            waiting.append((entry[0], threads.submit(entry[1])))

    def finished(job: Job) -> Iterator[tuple[Array, ...]]:
        while waiting and waiting[0][0] is job:
            result = waiting.popleft()[1].result()
            refill()
            yield result
            del result

    refill()
    while waiting:
        job = waiting[0][0]
        yield job, finished(job)


def _cast(values: Array, initializer: ir.Value, source: Source) -> Array:
    """Values in the initializer's dtype.

    Raises:
        AdapterError: with the blocks they are more than float16 holds. CheckpointError: they are so by themselves.
    """
    with np.errstate(over="ignore"):
        made: Array = np.ascontiguousarray(values, _numpy_dtype(initializer))
    narrow = made.dtype == np.float16 != values.dtype
    if narrow and not np.isfinite(made).all() and np.isfinite(values[~np.isfinite(made)]).any():
        if source.blocks is not None:
            raise AdapterError(f"{initializer.name}: base plus blocks overflows float16; take --precision fp32")
        raise CheckpointError(f"{initializer.name}: its values overflow float16; take --precision fp32")
    return made


def by_turns(values: Array) -> Array:
    """(experts, rows, …) with the rows of the first and of the second half by turns."""
    first, second = np.split(values, 2, axis=1)
    return np.stack([first, second], axis=2).reshape(values.shape)


def placeholder(graph: ir.Graph, name: str, dtype: ir.DataType | None, shape: tuple[int, ...]) -> ir.Value:
    """An initializer whose values come later."""
    assert dtype is not None
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    value.const_value = ir.ExternalTensor("", 0, 0, dtype, shape=ir.Shape(shape), name=name)
    graph.register_initializer(value)
    return value


def _rows(info: TensorInfo, rows: slice) -> TensorInfo:
    """The same stored tensor, cut to some of its rows: they lie together."""
    size = info.nbytes // max(1, info.shape[0])
    return dataclasses.replace(
        info,
        shape=(rows.stop - rows.start, *info.shape[1:]),
        start=info.start + rows.start * size,
        stop=info.start + rows.stop * size,
    )


def _step(width: int) -> int:
    return max(1, _PIECE // max(1, width))


def _padding(offset: int) -> int:
    return -offset % _PAGE  # page-aligned, so that a runtime can map each tensor


def _bytes(values: Array | bytes) -> memoryview:
    if isinstance(values, bytes):
        return memoryview(values)
    if not values.size:
        return memoryview(b"")
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _numpy_dtype(value: ir.Value) -> npt.DTypeLike:
    assert value.dtype is not None
    return ml_dtypes.bfloat16 if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy()


def _point(value: ir.Value, folder: Path, file_name: str, offset: int, length: int) -> None:
    """Make an initializer refer to bytes of the data file."""
    shape: Any = value.shape
    assert shape is not None and value.dtype is not None and value.name is not None
    size = int(np.prod(shape.numpy(), dtype=np.int64) * value.dtype.itemsize)
    if size != length:
        raise CheckpointError(
            f"{value.name}: the graph wants {list(shape.numpy())} of {value.dtype.name}, {size} bytes; the model's "
            f"weight gives {length}. The model's config.json does not describe its weights"
        )
    value.const_value = ir.ExternalTensor(
        file_name, offset, length, value.dtype, shape=shape, name=value.name, base_dir=folder
    )
