"""The int codec against onnxruntime's own quantizer, bit for bit, and against its own inverse."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.capi import _pybind_state as ort

from diablo_export import quantization
from diablo_export.errors import InputError
from diablo_export.quantization import BITS, GROUP_SIZES, Quantized


def weights(out_features: int, in_features: int) -> list[np.ndarray]:
    random = np.random.default_rng(out_features * in_features)
    normal = random.normal(size=(out_features, in_features)).astype(np.float32)
    zeros = normal.copy()
    zeros[:, :20] = 0  # whole groups of zeros: scale 0
    ties = np.round(normal * 4) / 4  # values that fall half-way between two codes
    return [normal, np.abs(normal), -np.abs(normal), zeros, ties]


def by_onnxruntime(weight: np.ndarray, bits: int, group_size: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    out_features, in_features = weight.shape
    groups, per_byte = -(-in_features // group_size), 8 // bits
    codes = np.zeros((out_features, groups, group_size // per_byte), np.uint8)
    scales = np.zeros((out_features, groups), np.float32)
    zeros = np.zeros((out_features, -(-groups // per_byte)), np.uint8)
    padded = np.pad(weight, ((0, 0), (0, groups * group_size - in_features)))
    function = getattr(ort, f"quantize_matmul_{bits}bits")
    function(codes, np.ascontiguousarray(padded.T), scales, zeros, group_size, out_features, in_features, symmetric)
    return codes, scales, zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_bit_exact_with_onnxruntime(bits: int, group_size: int, symmetric: bool) -> None:
    for size in [(64, 512), (33, 100), (7, 172), (5, 64), (1, 16)]:
        for weight in weights(*size):
            codes, scales, zeros = by_onnxruntime(weight, bits, group_size, symmetric)
            ours = quantization.quantize(weight, bits, group_size, symmetric)
            np.testing.assert_array_equal(ours.codes, codes)
            np.testing.assert_array_equal(ours.scales, scales)
            if symmetric:
                assert ours.zero_points is None
            else:
                np.testing.assert_array_equal(ours.zero_points, zeros)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_dequantized_is_within_half_a_step(bits: int, symmetric: bool) -> None:
    weight = weights(33, 100)[0]
    coded = quantization.quantize(weight, bits, 32, symmetric)
    error = np.abs(quantization.dequantize(coded) - weight)
    steps = np.repeat(np.abs(coded.scales), 32, axis=1)[:, :100]
    # symmetric: the end of the grid away from the extreme value lacks one step, so its values may be a whole step off;
    # asymmetric: the zero point's own rounding adds up to half a step
    assert (error <= steps * 1.0001).all()
    assert np.median(error / steps) < 0.3  # uniform in ±½ gives 0.25


def test_requantizing_the_dequantized_changes_nothing() -> None:
    once = quantization.quantize(weights(16, 128)[0])
    again = quantization.quantize(quantization.dequantize(once))
    np.testing.assert_array_equal(once.codes, again.codes)
    np.testing.assert_array_equal(once.scales, again.scales)


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (3, 5, 11)).astype(np.uint8)
    packed = quantization.pack(values, bits)
    assert packed.shape == (3, 5, -(-11 * bits // 8))
    np.testing.assert_array_equal(quantization.unpack(packed, bits, 11), values)


def test_low_nibble_comes_first() -> None:
    assert quantization.pack(np.array([[1, 2]], np.uint8), 4).tolist() == [[0x21]]


def test_zero_points_default_to_the_middle() -> None:
    coded = quantization.quantize(weights(4, 64)[0], 4, 32, True)
    np.testing.assert_array_equal(quantization.zero_points(coded), 8)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (4, 48), (4, 0)])
def test_layouts_that_matmulnbits_does_not_have(bits: int, group_size: int) -> None:
    with pytest.raises(InputError, match=rf"{bits} bits in groups of {group_size}.*16, 32, 64, 128, 256"):
        quantization.quantize(np.ones((2, 64), np.float32), bits, group_size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_and_inf_are_refused(value: float, symmetric: bool) -> None:
    weight = np.ones((2, 64), np.float32)
    weight[1, 40] = value
    with pytest.raises(InputError, match="NaN or inf"):
        quantization.quantize(weight, symmetric=symmetric)


def test_codes_that_do_not_fit() -> None:
    coded = quantization.quantize(np.ones((2, 64), np.float32))
    with pytest.raises(InputError, match="do not fit in_features 128"):
        Quantized(coded.codes, coded.scales, None, 4, 32, 128)
