"""The checks: what each figure means, the limit that it is held to by default, and why that limit.

Some hold for every export. The rest depends on the precision, because a merge into int4 cannot be nearer to the
tuned model than int4 is to any model. Where a number would have to be invented, the figure is compared with the same
figure of the exported base: what the export costs a model that has no adapter at all. Shares and gains of few positions
are uncertain, so their default limits are widened by two standard errors (`widened`); the report shows the limit used.
"Measured" is TinyStories-656K adapted to Shakespeare by a weak, a middle and a strong adapter, groups of 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from diablo_export.errors import InputError, indented

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int2")
_BASELINE = "baseline."  # these are held to the baseline and to nothing else

# name → (at most "<=" or at least ">=", what it is)
FIGURES: Mapping[str, tuple[str, str]] = {
    "files": ("<=", "files of the folder that differ from the manifest's hashes"),
    "sources": ("<=", "files of base and adapter that differ from the manifest's hashes"),
    "runs": (">=", "1 if onnxruntime loads and runs the model"),
    "untouched": ("<=", "merged modules that differ from the base where no block reaches"),
    "modules.faulty": ("<=", "modules that differ from tuned's by more than their rounding, on the same input"),
    "logits.max_abs": ("<=", "largest difference of a logit from tuned"),
    "logits.mean_abs": ("<=", "mean difference of the logits from tuned"),
    "logits.cosine": (">=", "cosine of exported and tuned logits"),
    "logits.sqnr_db": (">=", "signal to noise of the logits, in decibels"),
    "kl.mean": ("<=", "mean KL(tuned ‖ exported), in nats"),
    "kl.p99": ("<=", "99th percentile of KL(tuned ‖ exported), in nats"),
    "kl.max": ("<=", "largest KL(tuned ‖ exported), in nats"),
    "kl.ratio": ("<=", "mean KL(tuned ‖ exported) over mean KL(base ‖ exported base)"),
    "kl.share": ("<=", "mean KL(tuned ‖ exported) over mean KL(tuned ‖ base)"),
    "top1_agreement": (">=", "share of positions with the same first choice as tuned"),
    "top5_agreement": (">=", "share of tuned's five first choices that exported has among its own"),
    "delta_p.rms": ("<=", "root mean square of what the probability of tuned's first choice moves by"),
    "top1_agreement.drop": ("<=", "agreement of exported base with base, less that of exported with tuned"),
    "perplexity.ratio": ("<=", "perplexity of exported over that of tuned"),
    "padding.right": ("<=", "largest difference of a batch padded at the right from one by one, over their deviation"),
    "padding.left": ("<=", "the same of a batch padded at the left"),
    "decode.max_abs": ("<=", "largest difference of a logit from tuned, decoding with the KV cache"),
    "decode.cache": ("<=", "largest difference of decoded logits from a prefill's, over their deviation"),
    "decode.diverged": ("<=", "prompts whose greedy text leaves tuned's"),
    "accuracy.drop": ("<=", "accuracy of tuned less that of exported"),
    "adapter.alive": (">=", "1 if scale 0 equals the base and scale 1 does not"),
    "adapter.bound": (">=", "1 if I/O binding gives the same logits with the adapter as a plain run"),
    "adapter.whole": (">=", "1 if exported is nearest to tuned, and not to the base or to a part of the adapter"),
    "adapter.survival_gain": (">=", "share of the adapter's effect on the logits that is left"),
    "adapter.survival_gain.error": ("<=", "distance from 1 of the share of the adapter's effect that is left"),
    "adapter.survival_cosine": (">=", "cosine of the effect that is left and the one wanted"),
    "baseline.kl.mean": ("<=", "mean KL(tuned ‖ exported), against the baseline's"),
    "baseline.top1_agreement": (">=", "top-1 agreement, against the baseline's"),
    "baseline.perplexity": ("<=", "perplexity of exported, against the baseline's"),
    "baseline.accuracy": (">=", "accuracy of exported, against the baseline's"),
    "baseline.survival_gain.error": ("<=", "distance of the survival gain from 1, against the baseline's"),
    "baseline.survival_cosine": (">=", "survival cosine, against the baseline's"),
}  # fmt: skip

_ALWAYS: Mapping[str, float] = {
    "files": 0,  # a byte that changed after the export was not checked by anyone
    "sources": 0,  # another base or adapter is another reference
    "runs": 1,
    "modules.faulty": 0,  # what is a fault, and why, is told in twins.py
    "adapter.alive": 1,
    "adapter.bound": 1,  # looked at where adapters are files
    "adapter.whole": 1,  # looked at in exports of other programs
}
_MERGED: Mapping[str, float] = {
    "untouched": 0,  # a merge changes only groups that meet a block; the rest is compared byte for byte
}
_EXACT: Mapping[str, float] = {
    "logits.max_abs": 1e-4,  # float32 kernels that sum in another order stay below it on logits of order 10
    "kl.max": 1e-6,  # logits within ±1e-4 move a log-probability by at most 2e-4, and KL by about its square
    "decode.max_abs": 1e-4,  # as logits.max_abs
    "decode.cache": 1e-4,  # one token or many are other kernels, so other sums, of the same numbers
    "padding.right": 1e-4,  # and so are one sequence or several
    "padding.left": 1e-4,
    "decode.diverged": 0,  # ties closer than the kernels' own difference are not counted
    "accuracy.drop": 0,
    "adapter.survival_gain.error": 1e-3,  # nothing is rounded: float32 noise on an effect ten times 1e-4 is the worst
}
_HALF: Mapping[str, float] = {
    # a float16 operation rounds by 2^-11, 66 dB; some hundred in a row, as a random walk, take 20 dB of that
    "logits.sqnr_db": 40,
    "kl.mean": 1e-3,  # 40 dB below logits of order 5 is a noise of 0.05, and KL is about half its variance
    "decode.cache": 0.02,  # as 40 dB, at the largest of many differences
    "padding.right": 0.02,
    "padding.left": 0.02,
    "adapter.survival_gain.error": 0.02,
    "accuracy.drop": 0.01,
}
_BFLOAT16: Mapping[str, float] = {
    # bfloat16 rounds weights by 2^-9, 54 dB, and nothing else: the comparison computes in float32
    "logits.sqnr_db": 30,
    "decode.cache": 1e-4,
    "padding.right": 1e-4,
    "padding.left": 1e-4,
    "adapter.survival_gain.error": 0.05,  # a weak block is rounded away in part; the gate for merges is 0.95
    "accuracy.drop": 0.01,
}
_QUANTIZED: Mapping[str, float] = {
    # activations are rounded to int8, and a sum in another order moves a code now and then: noise of the size of
    # int8's own, 36 dB below the logits on a real model (0.016), five deviations at the largest entry, twice that
    "decode.cache": 0.16,
    "padding.right": 0.16,  # the codes of one token do not depend on its neighbours, but their sums' order does
    "padding.left": 0.16,
    "accuracy.drop": 0.01,  # one point
}
_QUANTIZED_DECODER: Mapping[str, float] = {
    # rounding base and blocks together may cost what rounding the base cost, and once more where they meet: two
    # independent errors of one size have twice the variance, and KL grows with it. Measured: 0.55 to 0.92
    "kl.ratio": 2.0,
    # the same doubled error in first choices, of which it moves fewer. Measured: −0.04 to 0.01
    "top1_agreement.drop": 0.05,
}
_QUANTIZED_SHARE: Mapping[str, float] = {
    # a classifier's base is no working model: a head on a body that it was not trained for, whose own int4 error says
    # nothing; and a base that was quantized already has none, exported or not. The error is held against what the
    # adapter changes: gain and cosine of 0.95 leave a tenth of its square
    # (0.05² + 0.95²·(1/0.95² − 1)), and KL grows with the square. Measured (MiniLM on SST-2): about 0.01
    "kl.share": 0.1,
}
_QUANTIZED_MERGE: Mapping[str, float] = {
    "adapter.survival_gain": 0.95,  # the promise of a merge: at most a twentieth of the fine-tune is lost
    # an overshoot is as wrong as a loss. An adapter that arrives twice has gain 1.3 to 1.8, the stronger the nearer
    # to 1, because the network saturates; there kl.ratio catches it. Good merges are measured within 0.01
    "adapter.survival_gain.error": 0.25,
}
# Blocks stay float, and only the base under them and its int8 activations differ. What the base's rounding does to its
# answer is second order in its noise, and a loss. Measured on trained blocks and random ones of three strengths: int8
# 0.007; int4 0.01 to 0.03 in a model of 656,000 weights, which are hard to round. So int4 is held to the promise of a
# merge, a twentieth: an adapter at 0.85 or 1.15 of its strength is off by 0.11, at half or twice by 0.5.
# Two bits that were rounded to the nearest are off by 0.4 (KL of that base: 2.4 nats), and are no sound export.
_INT8_BRANCH: Mapping[str, float] = {"adapter.survival_gain.error": 0.02}
_QUANTIZED_BRANCH: Mapping[str, float] = {"adapter.survival_gain.error": 0.05}
# Exports of other programs whose exported base is not at hand: effect is exported − base in torch, so that the noise of
# the precision counts as effect as far as it points that way.
_HALF_ALONE: Mapping[str, float] = {
    "adapter.survival_gain.error": 0.1,  # 40 dB, 0.01 of the logits, on an effect of a tenth of them
}
_QUANTIZED_ALONE: Mapping[str, float] = {
    # the noise of int4 is as large as a weak adapter's effect: all that can be said is that exported is nearer to tuned
    # than to the base, which is a gain above a half, and not beyond it by as much. Measured on the builder's int4 of a
    # middle adapter, merged: 0.10, and 0.006 with the exported base; on its int4 of the base: 0.91
    "adapter.survival_gain.error": 0.5,
}
_INT8_BLOCKS: Mapping[str, float] = {
    # the base is float; only the adapter's effect is off, by as much as its blocks are: 0.007 of its size with 14 × 14
    # blocks, and `export` warns of 0.02. Layers add up such errors; a tenth of the effect is something else.
    # Measured: gain off by 0.0004, kl.share 1e-4
    "kl.share": 0.01,
    "adapter.survival_gain.error": 0.02,
    "accuracy.drop": 0.01,
}


def defaults(
    precision: str,
    *,
    branch: bool,
    classifier: bool = False,
    block_dtype: str | None = None,
    exported_base: bool = True,
    same_base: bool = False,
) -> dict[str, float]:
    """The limits that a check of this kind of export has when nobody says otherwise.

    Args:
        precision: fp32, fp16, bf16, int8, int4 or int2: what the adapted weights were written as.
        branch: the blocks are kept beside the weights, not merged into them.
        classifier: the model is one.
        block_dtype: fp32, fp16 or int8: what a branch's blocks are stored in; None: as the graph's floats.
        exported_base: what the export does to the base alone is known.
        same_base: it does nothing to it, because the base was quantized already.
    """
    limits = dict(_ALWAYS)
    if not branch:
        limits |= _MERGED
    if precision in ("int8", "int4", "int2"):
        kind = _QUANTIZED_SHARE if classifier or same_base else _QUANTIZED_DECODER
        beside = _INT8_BRANCH if precision == "int8" else _QUANTIZED_BRANCH
        adapter = beside if branch else _QUANTIZED_MERGE
        return {**limits, **_QUANTIZED, **kind, **(adapter if exported_base else _QUANTIZED_ALONE)}
    graph = _HALF if precision == "fp16" else _EXACT
    cache = {name: graph[name] for name in ("decode.cache", "padding.right", "padding.left")}  # go by the graph alone
    if block_dtype == "int8":
        return {**limits, **_INT8_BLOCKS, **cache}
    if block_dtype == "fp16":
        return {**limits, **_HALF, **cache}
    alone = {} if exported_base or precision == "fp32" else _HALF_ALONE
    return {**limits, **{"fp16": _HALF, "bf16": _BFLOAT16}.get(precision, _EXACT), **alone}


def widened(limits: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    """Limits with two standard errors of the figure added, where one is known; for limits that are upper bounds."""
    return {name: limit + 2 * errors.get(name, 0.0) for name, limit in limits.items()}


def parse(texts: Iterable[str]) -> dict[str, float]:
    """Read `NAME=VALUE` limits.

    Raises:
        InputError: a name that no figure has (all are listed), or a value that is no number.
    """
    limits: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise InputError(f"--limit {text}: write NAME=VALUE with a number, such as kl.mean=0.05") from error
        if name not in FIGURES or name.startswith(_BASELINE) or math.isnan(limits[name]):
            listed = {figure: entry for figure, entry in FIGURES.items() if not figure.startswith(_BASELINE)}
            known = indented(f"{figure} {sign} …   {what}" for figure, (sign, what) in listed.items())
            raise InputError(f"--limit {text}: no such figure, or no number; figures that can be limited are:\n{known}")
    return limits


def check(figures: Mapping[str, float], limits: Mapping[str, float], suffix: str = "") -> list[dict[str, Any]]:
    """Hold figures to limits: one `{"name", "value", "limit", "pass"}` each, in the order of FIGURES.

    A limited figure that this export does not have (a classifier's decode, say) is left out. NaN never passes.
    """
    checks = []
    for name, (sign, _) in FIGURES.items():
        if name in limits and name in figures:
            value, limit = figures[name], limits[name]
            held = value <= limit if sign == "<=" else value >= limit
            checks.append({"name": name + suffix, "value": value, "limit": limit, "pass": bool(held)})
    return checks
