from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from diablo_export.blockdiag import Array, add_to_weight, dense
from diablo_export.checkpoint import DTYPE_NAMES, TensorInfo, read_header, write_safetensors
from diablo_export.converters import onnx_weights
from diablo_export.converters.onnx_weights import Job, Source, float_job, quantized_job, write
from diablo_export.converters.rounding import gain_in
from diablo_export.errors import AdapterError, CheckpointError
from diablo_export.quantization import Quantized, dequantize, quantize

RANDOM = np.random.default_rng(0)


def stored(folder: Path, values: Array) -> TensorInfo:
    """`values` as a tensor of a checkpoint, after another one so that it does not start the file."""
    layout = {"first": ("F32", (3,)), "w": (DTYPE_NAMES[values.dtype], values.shape)}
    write_safetensors(folder / "x.safetensors", layout, [("first", np.ones(3, np.float32)), ("w", values)])
    return read_header(folder / "x.safetensors")[0]["w"]


def initializer(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def value_of(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many pieces":
        monkeypatch.setattr(onnx_weights, "_PIECE", 200)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_float_weight_keeps_every_value(tmp_path: Path, dtype: type, transposed: bool) -> None:
    weight: Array = RANDOM.normal(size=(37, 24)).astype(dtype)
    target = initializer("w", ir.DataType.FLOAT, (24, 37) if transposed else (37, 24))
    write(tmp_path, [float_job(target, Source(stored(tmp_path, weight)), transposed)])
    # widening to float32 is exact
    np.testing.assert_array_equal(value_of(target), weight.astype(np.float32).T if transposed else weight)


@pytest.mark.usefixtures("pieces")
def test_rows_of_a_fused_weight_with_blocks_added_before_the_cut(tmp_path: Path) -> None:
    weight = RANDOM.normal(size=(40, 24)).astype(ml_dtypes.bfloat16)
    blocks = RANDOM.normal(size=(4, 6, 10)).astype(np.float32)
    target = initializer("w", ir.DataType.FLOAT, (24, 12))
    source = Source(stored(tmp_path, weight), blocks=blocks, rows=(15, 27))
    write(tmp_path, [float_job(target, source, transposed=True)])
    # added in float32, not rounded back to bfloat16
    expected = add_to_weight(weight.astype(np.float32), blocks)[15:27].T
    np.testing.assert_array_equal(value_of(target), expected)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_more_than_float16_holds_is_refused(merged: bool, transposed: bool, tmp_path: Path) -> None:
    weight = np.full((4, 6), 1 if merged else 70_000, np.float32)
    source = Source(weight, blocks=np.full((2, 3, 2), 70_000, np.float32) if merged else None)
    target = initializer("up", ir.DataType.FLOAT16, (6, 4) if transposed else (4, 6))
    what = "base plus blocks overflows" if merged else "its values overflow"
    with pytest.raises(AdapterError if merged else CheckpointError, match=rf"up: {what} float16; .*fp32"):
        write(tmp_path, [float_job(target, source, transposed)])


def test_conv1d_weight_is_turned_before_blocks_are_added(tmp_path: Path) -> None:
    kept = RANDOM.normal(size=(24, 40)).astype(np.float32)  # (in, out), as GPT-2 stores it
    blocks = RANDOM.normal(size=(4, 6, 10)).astype(np.float32)
    source = Source(stored(tmp_path, kept), conv1d=True, blocks=blocks)
    assert source.shape == (40, 24)
    target = initializer("w", ir.DataType.FLOAT, (24, 40))
    write(tmp_path, [float_job(target, source, transposed=True)])
    np.testing.assert_array_equal(value_of(target), add_to_weight(kept.T, blocks).T)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_weight_is_what_quantize_gives(tmp_path: Path, bits: int, symmetric: bool) -> None:
    weight: Array = RANDOM.normal(size=(40, 50)).astype(ml_dtypes.bfloat16)  # 50: the last group is padded
    wanted = quantize(weight.astype(np.float32), bits, 16, symmetric)
    codes = initializer("c", ir.DataType.UINT8, wanted.codes.shape)
    scales = initializer("s", ir.DataType.FLOAT, wanted.scales.shape)
    zeros = None if wanted.zero_points is None else initializer("z", ir.DataType.UINT8, wanted.zero_points.shape)
    write(tmp_path, [quantized_job(codes, scales, zeros, Source(stored(tmp_path, weight)), bits, 16)])
    got = Quantized(value_of(codes), value_of(scales), None if zeros is None else value_of(zeros), bits, 16, 50)
    np.testing.assert_array_equal(got.codes, wanted.codes)
    np.testing.assert_array_equal(dequantize(got), dequantize(wanted))


def test_data_file_is_hashed_in_order_and_page_aligned(tmp_path: Path) -> None:
    weights = [RANDOM.normal(size=(size, 8)).astype(np.float32) for size in (5, 300, 1, 77)]
    targets = [initializer(f"w{i}", ir.DataType.FLOAT, weight.shape) for i, weight in enumerate(weights)]
    jobs = [float_job(target, Source(weight), False) for target, weight in zip(targets, weights, strict=True)]
    written: list[float] = []
    digest = write(tmp_path, jobs, written.append)
    raw = (tmp_path / "model.onnx.data").read_bytes()
    assert digest == hashlib.sha256(raw).hexdigest()
    assert sum(written) == len(raw)
    for target, weight in zip(targets, weights, strict=True):
        place = target.const_value
        assert isinstance(place, ir.ExternalTensor) and place.offset is not None
        assert place.offset % 4096 == 0
        assert raw[place.offset : place.offset + weight.nbytes] == weight.tobytes()


def test_only_a_few_pieces_are_computed_ahead(tmp_path: Path) -> None:
    alive = peak = 0

    def piece() -> tuple[Array, ...]:
        nonlocal alive, peak
        alive += 1
        peak = max(peak, alive)
        return (np.zeros(8, np.float32),)

    def advance(amount: float) -> None:
        nonlocal alive
        alive -= amount > 0

    target = initializer("w", ir.DataType.FLOAT, (100, 8))
    write(tmp_path, [Job((target,), lambda: (piece for _ in range(100)))], advance)
    assert 1 <= peak <= onnx_weights._AHEAD + 1


def test_weight_of_another_size_than_the_graph_is_refused(tmp_path: Path) -> None:
    target = initializer("w", ir.DataType.FLOAT, (4, 4))
    job = float_job(target, Source(np.zeros((5, 4), np.float32)), transposed=False)
    with pytest.raises(CheckpointError, match=r"w: the graph wants \[4, 4\] of FLOAT, 64 bytes; .* gives 80"):
        write(tmp_path, [job])


def test_truncated_checkpoint_stops_the_write(tmp_path: Path) -> None:
    info = stored(tmp_path, np.ones((64, 64), np.float32))
    info.file.write_bytes(info.file.read_bytes()[:-100])
    target = initializer("w", ir.DataType.FLOAT, (64, 64))
    with pytest.raises(CheckpointError, match="ends inside tensor 'w'"):
        write(tmp_path, [float_job(target, Source(info), transposed=False)])


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0])
def test_what_float16_leaves_of_blocks(scale: float) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(10, 7)).astype(np.float32)
    blocks = (random.normal(size=(4, 2, 3)) * scale).astype(np.float32)  # padded: 8 × 12 over 7 × 10
    delta = dense(blocks, 7, 10).T
    with_blocks, without = ((weight + by * delta).astype(np.float16).astype(np.float64) for by in (1, 0))
    wanted = float(np.vdot(with_blocks - without, delta) / np.vdot(delta, delta))
    assert gain_in(np.float16, weight, blocks) == pytest.approx(wanted, rel=1e-6)  # sums of float32
    assert gain_in(np.float16, weight, np.zeros_like(blocks)) == 1
