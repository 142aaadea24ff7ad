"""Recognising a weight: exactly by its bytes, and approximately by its values.

The hash tells one base from another. The samples tell which weight this is after a change of dtype, name or
layout, or after int4: 64 values at fixed positions, whose correlation with an int4 copy is about 0.99 and with any
other weight about 0 ± 0.125.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from diablo_export.blockdiag import Array
from diablo_export.checkpoint import DTYPE_NAMES
from diablo_export.errors import AdapterError

SAMPLES = 64
# 64 samples of unrelated weights correlate by 0 ± 1/8: 0.8 is more than six deviations away, and int4 stays above 0.95
SAME_WEIGHT = 0.8
_STRIDE = 0x9E3779B97F4A7C15  # 2⁶⁴ over the golden ratio: its multiples spread evenly over any range


@dataclass(frozen=True)
class Fingerprint:
    """What is known of one base weight, taken as (out_features, in_features)."""

    dtype: str
    xxh3_128: str  # of its bytes; told apart are bases, not forgeries, and a merge hashes every weight
    samples: npt.NDArray[np.float32]  # (SAMPLES,)

    def to_json(self) -> dict[str, str]:
        """As it stands in adapter_config.json: samples are 64 little-endian float32 in base64."""
        raw = self.samples.astype("<f4").tobytes()
        return {"dtype": self.dtype, "xxh3_128": self.xxh3_128, "samples": base64.b64encode(raw).decode()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fingerprint:
        """Read what `to_json` wrote.

        Raises:
            AdapterError: a field is missing or malformed.
        """
        try:
            samples = np.frombuffer(base64.b64decode(value["samples"], validate=True), "<f4").astype(np.float32)
            if samples.shape != (SAMPLES,):
                raise ValueError(f"{samples.size} samples")
            return cls(str(value["dtype"]), str(value["xxh3_128"]), samples)
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"adapter_config.json: broken fingerprint ({error})") from error

    def matches(self, weight: Array) -> bool:
        """Whether `weight` (out_features, in_features) is this very base weight.

        In the fingerprint's own dtype every byte counts. In another float dtype the samples must agree to the
        coarser of the two roundings.
        """
        if DTYPE_NAMES.get(weight.dtype) == self.dtype:
            return _hash(weight) == self.xxh3_128
        return self.agrees(sample(weight))

    def agrees(self, samples: npt.NDArray[np.float32]) -> bool:
        """Whether another weight's samples are these, but for a rounding to another float dtype."""
        # bfloat16 keeps 8 bits: one rounding is at most 2⁻⁸ of the value
        return bool(np.allclose(samples, self.samples, rtol=2**-8, atol=1e-7))

    def similarity(self, samples: npt.NDArray[np.float32]) -> float:
        """Cosine between these samples and another weight's; see SAME_WEIGHT."""
        norms = float(np.linalg.norm(samples)) * float(np.linalg.norm(self.samples))
        return float(samples @ self.samples) / norms if norms else 0.0


def fingerprint(weight: Array) -> Fingerprint:
    """The fingerprint of a weight (out_features, in_features), in the dtype of its checkpoint."""
    return Fingerprint(DTYPE_NAMES[weight.dtype], _hash(weight), sample(weight))


def positions(out_features: int, in_features: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The (rows, columns) that are sampled; they depend on the sizes only."""
    size = out_features * in_features
    flat = np.array([(i * _STRIDE % 2**64) * size >> 64 for i in range(1, SAMPLES + 1)], np.int64)
    return flat // in_features, flat % in_features


def sample(weight: Array) -> npt.NDArray[np.float32]:
    """The sampled values of a weight (out_features, in_features), shape (SAMPLES,)."""
    return weight[positions(*weight.shape)].astype(np.float32)


class ValuesDigest:
    """XXH3-128 of a weight's values, which are added row by row: the same however it is stored."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def add(self, rows: Array) -> ValuesDigest:
        """Go on with the next rows, (rows, in_features)."""
        # a code at its zero point gives 0 or −0
        values = np.ascontiguousarray(rows + np.float32(0), np.float32)
        self._digest.update(values.view(np.uint8).data)
        return self

    def hex(self) -> str:
        """Of all rows so far."""
        return self._digest.hexdigest()


def _hash(weight: Array) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(weight).view(np.uint8).data)
