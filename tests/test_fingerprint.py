"""Weights are recognised after a change of dtype and after int4, and no others are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from diablo_export import quantization
from diablo_export.errors import AdapterError
from diablo_export.fingerprint import SAME_WEIGHT, SAMPLES, Fingerprint, ValuesDigest, fingerprint, positions, sample


def weight(seed: int = 0, shape: tuple[int, int] = (96, 64)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_one_changed_value_is_another_weight() -> None:
    mark, changed = fingerprint(weight()), weight()
    assert mark.matches(weight())
    changed[50, 3] = np.nextafter(changed[50, 3], np.float32(9))
    assert not mark.matches(changed)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_same_weight_in_another_dtype(dtype: type) -> None:
    mark = fingerprint(weight())
    assert mark.matches(weight().astype(dtype))
    assert not mark.matches(weight(1).astype(dtype))
    assert not mark.matches((weight() * np.float32(1.01)).astype(dtype))  # more than any rounding, 2⁻⁸, explains
    assert fingerprint(weight().astype(dtype)).matches(weight().astype(dtype).astype(np.float32))


@pytest.mark.parametrize("group_size", [16, 32, 128, 256])
def test_int4_copies_are_recognised_among_a_hundred(group_size: int) -> None:
    marks = [fingerprint(weight(seed)) for seed in range(100)]
    rounded = quantization.dequantize(quantization.quantize(weight(7), 4, group_size))
    scores = [mark.similarity(sample(rounded)) for mark in marks]
    assert scores[7] > SAME_WEIGHT + 0.1
    assert max(score for seed, score in enumerate(scores) if seed != 7) < SAME_WEIGHT - 0.1


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (100_000, 3)])
def test_positions_lie_inside_and_are_fixed(shape: tuple[int, int]) -> None:
    rows, columns = positions(*shape)
    assert rows.shape == columns.shape == (SAMPLES,)
    assert rows.min() >= 0 and rows.max() < shape[0] and columns.min() >= 0 and columns.max() < shape[1]
    if shape == (64, 64):  # pinned: adapters on disk depend on them; 4096 · (k/φ mod 1)
        assert (rows[:3].tolist(), columns[:3].tolist()) == ([39, 15, 54], [35, 6, 42])


def test_json_round_trip() -> None:
    mark = fingerprint(weight())
    again = Fingerprint.from_json(mark.to_json())
    assert again.xxh3_128 == mark.xxh3_128 and again.dtype == "F32"
    np.testing.assert_array_equal(again.samples, mark.samples)


@pytest.mark.parametrize("samples", [None, "%", "AAAA", "AAAA" * 84])  # none, no base64, 3 bytes, 63 numbers
def test_broken_json(samples: str | None) -> None:
    broken = {"dtype": "F32", "xxh3_128": "x"} | ({} if samples is None else {"samples": samples})
    with pytest.raises(AdapterError, match="broken fingerprint"):
        Fingerprint.from_json(broken)


def test_a_digest_of_values_goes_by_what_is_read_not_by_how_it_came() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    weight[0, 0] = 0
    whole = ValuesDigest().add(weight).hex()
    other = weight.copy()
    other[0, 0] = -0.0
    assert ValuesDigest().add(other[:2]).add(np.asfortranarray(other[2:])).hex() == whole
    other[5, 4] = np.nextafter(other[5, 4], np.float32(9))
    assert ValuesDigest().add(other).hex() != whole
