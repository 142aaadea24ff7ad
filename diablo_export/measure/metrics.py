"""How far one set of logits is from another: plain numpy formulas, and the running sums that hold a whole data set.

Logits are (positions, classes); classes are a vocabulary, or a classifier's labels. Everything is computed in
float64. *Effect* is exported − exported base, *wanted* is tuned − base. Both are centred per position before they
are compared: adding one number to every logit of a position changes no probability, so it is no survival.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from diablo_export.blockdiag import Array

Float64 = npt.NDArray[np.float64]
_FIRST = 5  # choices that `distribution` compares
_ENTRIES_AT_ONCE = 1 << 17  # logits per step: the float64 temporaries of a step, 1 MB each, stay in the cache


def log_softmax(logits: Array) -> Float64:
    """Log-probabilities of logits (…, classes)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normalised: Float64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


def kl(reference: Array, other: Array) -> Float64:
    """KL(reference ‖ other) in nats at each position; logits (positions, classes) → (positions,)."""
    p, q = log_softmax(reference), log_softmax(other)
    # rounding can leave −1e-16 where both are equal; a divergence is never negative
    divergence: Float64 = np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)
    return divergence


def nll(logits: Array, targets: npt.NDArray[np.int64]) -> Float64:
    """Negative log-likelihood in nats of targets (positions,) under logits (positions, classes)."""
    picked: Float64 = -log_softmax(logits)[np.arange(len(targets)), targets]
    return picked


def top1(reference: Array, other: Array) -> npt.NDArray[np.bool_]:
    """Where both have the same first choice: (positions,)."""
    return np.asarray(reference.argmax(-1) == other.argmax(-1))


def overlap(reference: Array, other: Array, count: int) -> Float64:
    """Share of the `count` first choices of each position that both have: (positions,)."""
    count = min(count, reference.shape[-1])
    one, two = (np.argpartition(-logits, count - 1, -1)[:, :count] for logits in (reference, other))
    shared: Float64 = (one[:, :, None] == two[:, None, :]).any(-1).mean(-1)
    return shared


def delta_p(reference: Array, other: Array) -> Float64:
    """Probability of the reference's first choice: other's less its own, at each position; (positions,)."""
    rows, first = np.arange(len(reference)), reference.argmax(-1)
    moved: Float64 = np.exp(log_softmax(other)[rows, first]) - np.exp(log_softmax(reference)[rows, first])
    return moved


@dataclass(frozen=True)
class _Softmax:
    """A few positions of one model with what every formula above needs, computed once: their exponentials.

    Attributes:
        logits: (positions, classes), float64.
        probabilities: (positions, classes).
        total: (positions,), the logarithm of the sum of the exponentials.
    """

    logits: Float64
    probabilities: Float64
    total: Float64

    @classmethod
    def of(cls, logits: Array) -> _Softmax:
        wide = logits.astype(np.float64)
        top = wide.max(-1, keepdims=True)
        powers = np.subtract(wide, top)
        np.exp(powers, out=powers)
        sums = powers.sum(-1, keepdims=True)
        powers /= sums
        return cls(wide, powers, (np.log(sums) + top)[:, 0])

    def kl(self, other: _Softmax, apart: Float64) -> Float64:
        """As `kl`; `apart` is self.logits − other.logits."""
        divergence: Float64 = np.einsum("ij,ij->i", self.probabilities, apart) - (self.total - other.total)
        return np.maximum(divergence, 0.0)

    def nll(self, rows: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> Float64:
        """As `nll`, of some positions."""
        found: Float64 = self.total[rows] - self.logits[rows, targets]
        return found


def standard_error(values: Float64) -> float:
    """Of the mean of independent values; nan of fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def dot(x: Array, y: Array) -> float:
    """Sum of x · y over all entries. Not by BLAS: its threads gain nothing on two streams of memory, and then wait
    in a loop, which takes the processor away from the models that run in turns with this."""
    return float(np.einsum("i,i", x.ravel(), y.ravel()))


def cosine(a: Array, b: Array) -> float:
    """Cosine of two tensors taken as vectors; nan where one is all zeros."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return _ratio(dot(x, y), math.sqrt(dot(x, x) * dot(y, y)))


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal to noise in decibels, 10·log₁₀(‖reference‖² / ‖reference − other‖²); inf where they are equal."""
    x = reference.astype(np.float64)
    return decibels(float((x**2).sum()), float(((x - other) ** 2).sum()))


def decibels(signal: float, noise: float) -> float:
    """10·log₁₀(signal / noise); inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def centred(logits: Array) -> Float64:
    """Logits less their mean at each position."""
    wide = logits.astype(np.float64)
    moved: Float64 = wide - wide.mean(-1, keepdims=True)
    return moved


def survival(effect: Array, wanted: Array) -> tuple[float, float]:
    """(gain, cosine) of an effect against the wanted one: <effect, wanted> / <wanted, wanted>, and their cosine.

    Gain 1 and cosine 1: all of it arrived. Gain 0: nothing. Both nan where nothing was wanted.
    """
    x, y = effect.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    return _ratio(dot(x, y), dot(y, y)), cosine(x, y)


@dataclass
class Comparison:
    """Running sums over positions of what tuned, base, exported and exported base say.

    `update` takes a few positions at a time; nothing of the size of a vocabulary is kept.
    """

    positions: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _max_abs: float = 0.0
    _largest_wanted: float = 0.0
    _largest_effect: float = 0.0
    _kl: list[Float64] = field(default_factory=list)
    _delta_p: list[Float64] = field(default_factory=list)
    _products: list[Float64] = field(default_factory=list)  # <effect, wanted> and <wanted, wanted> at each position
    _nll: dict[str, list[Float64]] = field(default_factory=dict)

    def update(
        self,
        tuned: Array,
        base: Array,
        exported: Array,
        exported_base: Array,
        targets: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Add positions: four logits (positions, classes), and the token that follows each, or −1 for none."""
        step = max(1, _ENTRIES_AT_ONCE // tuned.shape[-1])
        for start in range(0, len(tuned), step):
            rows = slice(start, start + step)
            t, b, e, eb = (_Softmax.of(logits[rows]) for logits in (tuned, base, exported, exported_base))
            self._update(t, b, e, eb, None if targets is None else targets[rows])

    def _update(
        self,
        tuned: _Softmax,
        base: _Softmax,
        exported: _Softmax,
        exported_base: _Softmax,
        targets: npt.NDArray[np.int64] | None,
    ) -> None:
        t, e = tuned.logits, exported.logits
        wanted, effect, apart = t - base.logits, e - exported_base.logits, t - e
        self._kl.append(tuned.kl(exported, apart))
        self._add("base_kl", base.kl(exported_base, base.logits - exported_base.logits).sum())
        self._add("wanted_kl", tuned.kl(base, wanted).sum())
        self._add_squares(t, e, apart)
        self._add_effect(effect, wanted)
        rows, first = np.arange(len(t)), t.argmax(-1)
        self._delta_p.append(exported.probabilities[rows, first] - tuned.probabilities[rows, first])
        self._add("agree", (first == e.argmax(-1)).sum())
        self._add("agree5", overlap(t, e, _FIRST).sum())
        self._add("base_agree", top1(base.logits, exported_base.logits).sum())
        self.positions += len(t)
        if targets is not None:
            counted = np.flatnonzero(targets >= 0)
            for name, one in (("tuned", tuned), ("exported", exported), ("base", base)):
                self._nll.setdefault(name, []).append(one.nll(counted, targets[counted]))

    def _add_squares(self, tuned: Float64, exported: Float64, apart: Float64) -> None:
        distance = np.abs(apart)
        # written so that a NaN stays: max() of Python would drop it
        self._max_abs = float(np.maximum(self._max_abs, distance.max()))
        self._add("entries", tuned.size)
        self._add("abs", distance.sum())
        for name, one, two in (("noise", apart, apart), ("tt", tuned, tuned), ("ee", exported, exported)):
            self._add(name, dot(one, two))
        self._add("te", dot(tuned, exported))

    def _add_effect(self, effect: Float64, wanted: Float64) -> None:
        for moved in (effect, wanted):
            moved -= moved.mean(-1, keepdims=True)  # as `centred`
        self._largest_wanted = float(np.maximum(self._largest_wanted, np.abs(wanted).max()))
        self._largest_effect = float(np.maximum(self._largest_effect, np.abs(effect).max()))
        products = np.array([np.einsum("ij,ij->i", one, wanted) for one in (effect, wanted)])  # (2, positions)
        self._products.append(products)
        for name, total in zip(("effect_wanted", "wanted_wanted"), products.sum(1), strict=True):
            self._add(name, total)
        self._add("effect_effect", dot(effect, effect))

    def _add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def logits(self) -> dict[str, float]:
        """max_abs, mean_abs, cosine and sqnr_db of exported against tuned."""
        s = self._sums
        return {
            "max_abs": self._max_abs,
            "mean_abs": s["abs"] / s["entries"],
            "cosine": _ratio(s["te"], math.sqrt(s["tt"] * s["ee"])),
            "sqnr_db": decibels(s["tt"], s["noise"]),
        }

    def divergence(self) -> dict[str, float]:
        """Mean, 99th percentile and maximum of KL(tuned ‖ exported) over positions, in nats."""
        values = np.concatenate(self._kl)
        return {
            "mean": float(values.mean()),
            "p99": float(np.quantile(values, 0.99)),
            "max": float(values.max()),
        }

    def distribution(self) -> dict[str, Any]:
        """How positions differ among themselves.

        Returns:
            `kl_median`, and `kl_error`, the standard error of the mean KL. `top5_agreement`: mean share of tuned's
            five first choices that are exported's too. `delta_p`: quantiles and root mean square of exported's
            probability of tuned's first choice, less tuned's. `kl_histogram`: counts of positions between the powers of
            ten of `edges`; the first and the last are open.
        """
        moved, values = np.concatenate(self._delta_p), np.concatenate(self._kl)
        edges = 10.0 ** np.arange(-9, 3)
        counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
        quantiles = {f"p{share}": float(np.quantile(moved, share / 100)) for share in (1, 5, 50, 95, 99)}
        return {
            "kl_median": float(np.median(values)),
            "kl_error": standard_error(values),
            "top5_agreement": self._sums["agree5"] / self.positions,
            "delta_p": {**quantiles, "rms": float(np.sqrt((moved**2).mean()))},
            "kl_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }

    def by_length(self, lengths: Sequence[int]) -> list[dict[str, Any]]:
        """Mean KL of short and long sequences apart, to see a prefill that goes wrong from some length on.

        Args:
            lengths: tokens of each sequence, in the order in which `update` was given them.

        Returns:
            `{"tokens": [shortest, longest], "sequences", "positions", "kl_mean"}` for each range up to 2, 8, 32, 128, …
            tokens that has sequences.
        """
        values = np.concatenate(self._kl)
        # a classifier gives one position for a sequence, a language model one for each token
        counts = lengths if sum(lengths) == len(values) else [1] * len(lengths)
        parts = np.split(values, np.cumsum(counts)[:-1])
        classes: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            classes.setdefault((length - 1).bit_length() // 2, []).append(index)
        found = []
        for _, members in sorted(classes.items()):
            own = np.concatenate([parts[index] for index in members])
            ends = [min(lengths[index] for index in members), max(lengths[index] for index in members)]
            found.append({
                "tokens": ends,
                "sequences": len(members),
                "positions": len(own),
                "kl_mean": float(own.mean()),
            })
        return found

    @property
    def base_kl(self) -> float:
        """Mean KL(base ‖ exported base) in nats: what the export costs without any adapter."""
        return self._sums["base_kl"] / self.positions

    @property
    def wanted_kl(self) -> float:
        """Mean KL(tuned ‖ base) in nats: what the adapter changes."""
        return self._sums["wanted_kl"] / self.positions

    @property
    def agreement(self) -> float:
        """Share of positions where exported and tuned have the same first choice."""
        return self._sums["agree"] / self.positions

    @property
    def base_agreement(self) -> float:
        """The same of exported base and base."""
        return self._sums["base_agree"] / self.positions

    def perplexity(self) -> dict[str, float] | None:
        """exp(mean negative log-likelihood) of tuned, exported and base; None without targets."""
        found = self._likelihoods()
        return {name: _exp(float(values.mean())) for name, values in found.items()} if found else None

    def perplexity_error(self) -> dict[str, float] | None:
        """Standard errors of `perplexity`, and of exported's over tuned's as `ratio`; None without targets.

        The ratio's is far smaller than the others' would suggest: both models find the same tokens hard.
        """
        found = self._likelihoods()
        if not found:
            return None
        errors = {name: _exp(float(values.mean())) * standard_error(values) for name, values in found.items()}
        apart = found["exported"] - found["tuned"]
        return {**errors, "ratio": _exp(float(apart.mean())) * standard_error(apart)}

    def _likelihoods(self) -> dict[str, Float64]:
        """Negative log-likelihoods of all targets, by model; empty without targets."""
        found = {name: np.concatenate(parts) for name, parts in self._nll.items()}
        return found if found and all(len(values) for values in found.values()) else {}

    def survival(self) -> tuple[float, float]:
        """(gain, cosine) over all positions; nan where tuned is base."""
        s = self._sums
        gain = _ratio(s["effect_wanted"], s["wanted_wanted"])
        return gain, _ratio(s["effect_wanted"], math.sqrt(s["wanted_wanted"] * s["effect_effect"]))

    def survival_error(self) -> float:
        """Standard error of the gain, taking positions as independent; nan where tuned is base.

        An export's own noise, such as int4's, moves each position's effect this way and that; of few positions some is
        left in the gain.
        """
        effect, wanted = np.concatenate(self._products, axis=1)
        gain = self.survival()[0]
        return _ratio(float(np.linalg.norm(effect - gain * wanted)), float(wanted.sum()))

    @property
    def largest_wanted(self) -> float:
        """The most that the adapter moves any centred logit in torch."""
        return self._largest_wanted

    @property
    def largest_effect(self) -> float:
        """The most that it moves any centred logit of the export."""
        return self._largest_effect


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # a double ends at e^709
