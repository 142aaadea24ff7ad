from __future__ import annotations

import math

import pytest

from diablo_export.errors import InputError
from diablo_export.measure import limits


@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("precision", limits.PRECISIONS)
def test_every_default_is_a_known_figure(precision: str, branch: bool, classifier: bool) -> None:
    found = limits.defaults(precision, branch=branch, classifier=classifier)
    assert set(found) <= set(limits.FIGURES)
    assert {"files", "sources", "runs", "adapter.alive"} <= set(found)
    assert ("untouched" in found) is not branch
    # whatever the precision, an adapter that is lost, or that arrives twice, is outside some limit on its gain
    lost = limits.check({"adapter.survival_gain": 0.0, "adapter.survival_gain.error": 1.0}, found)
    assert any(not check["pass"] for check in lost)


def test_the_promised_limits() -> None:
    assert limits.defaults("fp32", branch=False)["logits.max_abs"] == 1e-4
    assert limits.defaults("int4", branch=False)["adapter.survival_gain"] == 0.95
    assert limits.defaults("int4", branch=True)["adapter.survival_gain.error"] == 0.05
    assert limits.defaults("int8", branch=True)["adapter.survival_gain.error"] == 0.02


def test_an_error_is_held_to_the_adapter_where_the_base_has_none_of_its_own() -> None:
    for of in ({"classifier": True}, {"same_base": True}):
        found = limits.defaults("int4", branch=True, **of)
        assert found["kl.share"] == 0.1 and "kl.ratio" not in found
    assert "kl.ratio" in limits.defaults("int4", branch=True)


def test_blocks_in_fewer_bits_than_the_graph() -> None:
    exact = limits.defaults("fp32", branch=True)
    assert limits.defaults("fp32", branch=True, block_dtype="fp32") == exact
    for stored in ("fp16", "int8"):
        found = limits.defaults("fp32", branch=True, block_dtype=stored)
        assert set(found) <= set(limits.FIGURES)
        assert found["adapter.survival_gain.error"] == 0.02
        assert found["decode.cache"] == exact["decode.cache"], "the cache knows nothing of the blocks"
    for base in ("int8", "int4"):  # the base's own error is larger than that of int8 blocks
        assert limits.defaults(base, branch=True, block_dtype="int8") == limits.defaults(base, branch=True)


@pytest.mark.parametrize(
    ("name", "value", "limit", "held"),
    [
        ("kl.mean", 0.1, 0.1, True),
        ("kl.mean", 0.11, 0.1, False),
        ("kl.mean", math.nan, 0.1, False),
        ("top1_agreement", 0.9, 0.9, True),
        ("top1_agreement", 0.89, 0.9, False),
        ("top1_agreement", math.nan, 0.9, False),
    ],
)
def test_check(name: str, value: float, limit: float, held: bool) -> None:
    (check,) = limits.check({name: value}, {name: limit}, "@a")
    assert check["name"] == f"{name}@a" and check["limit"] == limit and check["pass"] is held


def test_figures_without_a_limit_and_limits_without_a_figure_are_no_checks() -> None:
    assert limits.check({"kl.mean": 1.0}, {"kl.max": 1.0}) == []


def test_shares_of_few_positions_get_two_standard_errors() -> None:
    assert limits.widened({"accuracy.drop": 0.01, "kl.ratio": 2.0}, {"accuracy.drop": 0.02}) == pytest.approx({
        "accuracy.drop": 0.05,
        "kl.ratio": 2.0,
    })


def test_parse() -> None:
    assert limits.parse(["kl.mean=0.5", "kl.mean=0.25", "files=1"]) == {"kl.mean": 0.25, "files": 1.0}


@pytest.mark.parametrize("text", ["kl.mean", "kl.mean=", "kl.mean=few", "kl.mean=1=2"])
def test_no_number(text: str) -> None:
    with pytest.raises(InputError, match=r"--limit kl\.mean.*: write NAME=VALUE with a number"):
        limits.parse([text])


@pytest.mark.parametrize("text", ["kl=1", "=1", "kl.mean=nan", "kl.mean@a=1", "baseline.kl.mean=1"])
def test_an_unknown_name_lists_all(text: str) -> None:
    with pytest.raises(InputError, match=r"(?s)no such figure.*  files <= .*  adapter\.survival_cosine >= "):
        limits.parse([text])
