from __future__ import annotations

import math

import numpy as np
import pytest

from diablo_export.blockdiag import Array
from diablo_export.measure import metrics

# float64 sums in another order: a few units in the last place of numbers of order 10
EXACT = 1e-12


@pytest.fixture
def logits() -> dict[str, Array]:
    """Four related logits, (9 positions, 7 classes), as float32."""
    random = np.random.default_rng(0)
    base = random.normal(0, 3, (9, 7))
    tuned = base + random.normal(0, 1, (9, 7))
    exported_base = base + random.normal(0, 0.1, (9, 7))
    exported = tuned + random.normal(0, 0.1, (9, 7))
    values = {"tuned": tuned, "base": base, "exported": exported, "exported_base": exported_base}
    return {name: value.astype(np.float32) for name, value in values.items()}


def softmax(row: Array) -> list[float]:
    """The slow obvious one, in Python floats."""
    powers = [math.exp(float(value)) for value in row]
    return [power / sum(powers) for power in powers]


def slow_kl(reference: Array, other: Array) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(reference), softmax(other), strict=True))


def test_kl_is_the_sum_over_classes(logits: dict[str, Array]) -> None:
    slow = [slow_kl(t, e) for t, e in zip(logits["tuned"], logits["exported"], strict=True)]
    np.testing.assert_allclose(metrics.kl(logits["tuned"], logits["exported"]), slow, rtol=1e-9)


def test_kl_of_equals_is_zero_and_of_huge_logits_finite() -> None:
    huge = np.array([[1e4, 0, -1e4]], np.float32)  # exp() of these overflows without the shift
    assert metrics.kl(huge, huge) == 0
    assert metrics.kl(huge, huge[:, ::-1])[0] == pytest.approx(2e4)


def test_nll_picks_the_target(logits: dict[str, Array]) -> None:
    targets = np.array([0, 3, 6, 1, 2, 5, 4, 0, 6])
    slow = [-math.log(softmax(row)[target]) for row, target in zip(logits["tuned"], targets, strict=True)]
    np.testing.assert_allclose(metrics.nll(logits["tuned"], targets), slow, rtol=1e-9)


def test_sqnr_and_cosine_by_hand() -> None:
    reference, other = np.array([3.0, 4.0]), np.array([3.0, 3.0])
    assert metrics.sqnr_db(reference, other) == pytest.approx(10 * math.log10(25 / 1))
    assert metrics.sqnr_db(reference, reference) == math.inf
    assert metrics.cosine(reference, other) == pytest.approx(21 / (5 * math.sqrt(18)))
    assert math.isnan(metrics.cosine(reference, np.zeros(2)))


def test_top1_counts_equal_first_choices() -> None:
    a, b = np.array([[1, 2], [5, 0], [0, 1]]), np.array([[0, 9], [1, 2], [3, 4]])
    assert metrics.top1(a, b).tolist() == [True, False, True]


@pytest.mark.parametrize(("kept", "gain"), [(1.0, 1.0), (0.0, 0.0), (2.0, 2.0), (-1.0, -1.0), (0.5, 0.5)])
def test_survival_is_the_share_of_the_wanted_effect(kept: float, gain: float) -> None:
    wanted = np.random.default_rng(1).normal(size=(5, 3))
    found, cosine = metrics.survival(kept * wanted, wanted)
    assert found == pytest.approx(gain)
    if kept:
        assert cosine == pytest.approx(math.copysign(1, kept))
    else:
        assert math.isnan(cosine)


def test_survival_of_nothing_wanted_is_undefined() -> None:
    gain, cosine = metrics.survival(np.ones(3), np.zeros(3))
    assert math.isnan(gain) and math.isnan(cosine)


def test_orthogonal_noise_lowers_the_cosine_but_not_the_gain() -> None:
    gain, cosine = metrics.survival(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    assert gain == pytest.approx(1)
    assert cosine == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("at_once", [1, 7, 20, 10_000])
def test_running_sums_equal_the_formulas_whatever_the_step(
    logits: dict[str, Array], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_ENTRIES_AT_ONCE", at_once)
    targets = np.array([0, 3, -1, 1, 2, 5, 4, 0, -1])  # two positions have no next token that counts
    running = metrics.Comparison()
    for rows in (slice(0, 4), slice(4, 9)):
        running.update(**{name: value[rows] for name, value in logits.items()}, targets=targets[rows])

    t, b, e, eb = (logits[n].astype(np.float64) for n in ("tuned", "base", "exported", "exported_base"))
    assert running.positions == 9
    assert running.logits() == pytest.approx(
        {
            "max_abs": np.abs(t - e).max(),
            "mean_abs": np.abs(t - e).mean(),
            "cosine": metrics.cosine(t, e),
            "sqnr_db": metrics.sqnr_db(t, e),
        },
        rel=EXACT,
    )
    divergence = metrics.kl(t, e)
    assert running.divergence() == pytest.approx(
        {"mean": divergence.mean(), "p99": np.quantile(divergence, 0.99), "max": divergence.max()}, rel=EXACT
    )
    assert running.agreement == metrics.top1(t, e).mean()
    assert running.base_agreement == metrics.top1(b, eb).mean()
    assert running.base_kl == pytest.approx(metrics.kl(b, eb).mean(), rel=EXACT)
    assert running.wanted_kl == pytest.approx(metrics.kl(t, b).mean(), rel=EXACT)
    wanted_effect = metrics.survival(metrics.centred(e - eb), metrics.centred(t - b))
    assert running.survival() == pytest.approx(wanted_effect, rel=EXACT)
    assert running.largest_wanted == pytest.approx(np.abs(metrics.centred(t - b)).max(), rel=EXACT)
    assert running.largest_effect == pytest.approx(np.abs(metrics.centred(e - eb)).max(), rel=EXACT)
    moved, found = metrics.delta_p(t, e), running.distribution()["delta_p"]
    assert found["rms"] == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-9)  # differences of numbers near 1
    assert found["p5"] == pytest.approx(np.quantile(moved, 0.05), rel=1e-9)
    slow = {
        name: math.exp(metrics.nll(logits[name][targets >= 0], targets[targets >= 0]).mean())
        for name in ("tuned", "exported", "base")
    }
    assert running.perplexity() == pytest.approx(slow, rel=EXACT)


def test_the_standard_error_of_a_gain_is_how_much_it_moves_from_sample_to_sample() -> None:
    random = np.random.default_rng(3)
    gains, errors = [], []
    for _ in range(200):
        base = random.normal(size=(50, 8)).astype(np.float32)
        wanted, noise = random.normal(size=(50, 8)), random.normal(0, 0.5, (50, 8))
        running = metrics.Comparison()
        running.update(*((base + part).astype(np.float32) for part in (wanted, 0, wanted / 4 + noise, 0)))
        gains.append(running.survival()[0])
        errors.append(running.survival_error())
    # of 200 samples, a deviation is known to 5 %
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.15)
    assert np.mean(gains) == pytest.approx(0.25, abs=0.01)  # of 200 samples that are 0.03 off


def test_a_common_shift_of_all_logits_is_no_survival(logits: dict[str, Array]) -> None:
    """Every probability stays as it was: nothing of the adapter arrived."""
    shifted = logits["exported_base"] + np.float32(2)
    running = metrics.Comparison()
    running.update(logits["tuned"], logits["base"], shifted, logits["exported_base"])
    assert running.survival()[0] == pytest.approx(0, abs=1e-6)  # float32 rounding of the shift


def test_without_targets_there_is_no_perplexity(logits: dict[str, Array]) -> None:
    running = metrics.Comparison()
    running.update(**logits)
    assert running.perplexity() is None


def test_nan_is_not_lost_on_the_way(logits: dict[str, Array]) -> None:
    broken = logits["exported"].copy()
    broken[2, 2] = np.nan
    running = metrics.Comparison()
    running.update(logits["tuned"], logits["base"], broken, logits["exported_base"])
    running.update(**logits)  # a later good batch must not hide it
    assert math.isnan(running.logits()["max_abs"])
    assert math.isnan(running.divergence()["mean"])
    assert math.isnan(running.survival()[0])


def test_distribution_by_hand() -> None:
    running = metrics.Comparison()
    tuned = np.log(np.array([[0.5, 0.3, 0.1, 0.05, 0.04, 0.01], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]]))
    exported = np.log(np.array([[0.4, 0.4, 0.1, 0.05, 0.04, 0.01], [0.2, 0.2, 0.2, 0.1, 0.1, 0.2]]))
    running.update(tuned, tuned, exported, tuned, np.array([1, -1]))
    found = running.distribution()
    slow = [slow_kl(t, e) for t, e in zip(tuned, exported, strict=True)]
    assert found["kl_median"] == pytest.approx(sum(slow) / 2)
    # the standard error of two values is half their distance
    assert found["kl_error"] == pytest.approx(abs(slow[0] - slow[1]) / 2)
    assert found["delta_p"]["rms"] == pytest.approx(math.sqrt(0.1**2 / 2))
    assert found["delta_p"]["p50"] == pytest.approx(-0.05)  # of 0.1 less and the same: the first choice lost
    assert found["kl_histogram"]["edges"][8:10] == pytest.approx([0.1, 1])
    assert found["kl_histogram"]["counts"] == [0] * 8 + [2] + [0] * 4  # 0.025 and 0.069 nats
    assert running.perplexity() == pytest.approx({"tuned": 1 / 0.3, "exported": 1 / 0.4, "base": 1 / 0.3})
    assert math.isnan(running.perplexity_error()["tuned"])  # one target has no spread


def test_error_of_a_ratio_is_that_of_paired_differences(logits: dict[str, Array]) -> None:
    running, targets = metrics.Comparison(), np.array([0, 3, 6, 1, 2, 5, 4, 0, 6])
    running.update(**logits, targets=targets)
    t, e = metrics.nll(logits["tuned"], targets), metrics.nll(logits["exported"], targets)
    expected = np.exp((e - t).mean()) * (e - t).std(ddof=1) / 3
    assert running.perplexity_error()["ratio"] == pytest.approx(expected, rel=EXACT)


def test_overlap_counts_choices_that_both_have() -> None:
    one, two = np.array([[9.0, 8, 7, 1, 0]]), np.array([[7.0, 9, 1, 8, 0]])
    assert metrics.overlap(one, two, 3) == pytest.approx([2 / 3])
    assert metrics.overlap(one, two, 9) == 1  # no more than there are


def test_sequences_of_like_length_are_one_class() -> None:
    running, lengths = metrics.Comparison(), [33, 1, 2, 3, 8, 9, 32]
    tuned = np.random.default_rng(0).normal(size=(sum(lengths), 3))
    running.update(tuned, tuned, tuned + np.eye(3)[0], tuned)
    found = running.by_length(lengths)
    assert [one["tokens"] for one in found] == [[1, 2], [3, 8], [9, 32], [33, 33]]
    assert [(one["sequences"], one["positions"]) for one in found] == [(2, 3), (2, 11), (2, 41), (1, 33)]
    divergence = metrics.kl(tuned, tuned + np.eye(3)[0])
    assert found[3]["kl_mean"] == pytest.approx(divergence[:33].mean(), rel=1e-9)  # float64, in another order
