"""`diablo-export merge`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from diablo_export.algorithms import ALGORITHMS
from diablo_export.cli.options import (
    adapter_option,
    base_option,
    grid_options,
    json_option,
    output_option,
    overwrite_option,
    precision_option,
    quantize_option,
    size,
    verbosity_options,
)
from diablo_export.cli.summary import print_next, print_summary
from diablo_export.console import log
from diablo_export.errors import CheckFailed
from diablo_export.quantization import BITS, GROUP_SIZES

_THOROUGH = ("auto", "distilled", "layerwise", "learned")  # methods beside which auto would keep no more
_WEAK = 0.01  # mean KL to the base in nats: hardly an answer is another one
_HALF = 0.5  # of the blocks' squares that rounding leaves in a weight, and of the modules


@click.command(short_help="Merge an adapter's blocks into the weights, float or quantized.")
@base_option
@adapter_option
@output_option
@quantize_option
@click.option(
    "--format", type=click.Choice(["onnx", "hf"]), help="What to write.  [default: onnx when quantizing, hf otherwise]"
)
@grid_options("as trained, else ")
@precision_option
@click.option(
    "--method", type=click.Choice(["auto", "rtn", "refit", "calibrated", "distilled", "layerwise", *ALGORITHMS]),
    help="How quantized weights take the blocks; k_quant, hqq, gptq, learned: every weight of a float model is "
    "quantized so, with the blocks in it.  [default: auto for 4 bits and fewer, rtn for 8; refit for a "
    "Hugging Face checkpoint that is quantized]",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="DATA",
    help="Text to calibrate and measure on, as for train; labels say the accuracy alone.  [default: text that the "
    "tuned model writes]",
)  # fmt: skip
@click.option(
    "--reference", metavar="M",
    help="Float model that an ONNX model was made from.  [default: the adapter's base]",
)  # fmt: skip
@click.option(
    "--min-survival", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.97, show_default=True,
    help="Least cosine of the adapter's effect on the logits with the effect wanted; its gain may be as far from 1.",
)  # fmt: skip
@click.option(
    "--max-seconds", type=click.FloatRange(0, min_open=True), default=900, show_default=True,
    help="About what methods other than rtn may take.",
)  # fmt: skip
@click.option(
    "--plan", metavar="auto|FILE",
    help="auto: decide module by module between a merge at the bits asked for, one at int8 and a branch, for the least "
    "size and time that keep --min-survival. FILE: the plan.toml of an earlier merge, edited or not.",
)  # fmt: skip
@click.option(
    "--max-bytes",
    metavar="SIZE",
    callback=size,
    help="With --plan auto, what the ONNX model and its data may take: a number, with kB, MB or GB behind it.",
)
@click.option(
    "--picture", type=click.Path(path_type=Path), metavar="FILE",
    help="Also draw what each method that was tried keeps of each module, as .png or .svg.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the text and its order.")
@overwrite_option
@json_option
@verbosity_options
def command(model: str, adapter: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Merge an adapter's blocks into its model's weights.

    Into int4, the fine-tune is measured and the method that keeps most of it is taken: see --method. Exit code 1 when
    even that one keeps less than --min-survival; the folder stays, marked so in its manifest. Elsewhere weights are
    rounded once, to the model's own type: exit code 1 when most modules lose more than half of their blocks by that.

    \b
    Example:
      diablo-export merge --model M --adapter adapter --quantize int4 --output int4
      diablo-export merge --model M --adapter adapter --quantize int4 --plan auto --max-bytes 300MB --output planned
    """
    from diablo_export.converters.merge import merge
    from diablo_export.manifest import plain

    manifest = merge(model, adapter, output, **options)
    if as_json:
        click.echo(json.dumps(plain(manifest), indent=1))
    else:
        print_summary(manifest, output)
        print_survival(manifest)
    survival = manifest.get("survival")
    if survival is not None and not survival["passed"]:
        raise CheckFailed(_missed(manifest, output, calibrated=bool(options["calibration"])))
    if survival is None:
        _check_rounding(manifest["modules"], output)
    if not as_json:
        print_next("parity", output, "--data", "test.jsonl")


def _check_rounding(modules: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Where nobody measures what the model does: a merge of which most modules lost most has failed.

    Raises:
        CheckFailed: more than half of them keep less than half of their blocks, by weights.
    """
    lost = [module["name"] for module in modules if module.get("weight_gain", 1.0) < _HALF]
    if len(lost) > _HALF * len(modules):
        raise CheckFailed(
            f"{output}: written, but rounding to its weights' type took more than half of the blocks of {len(lost)} of "
            f"{len(modules)} modules ({', '.join(lost[:3])}{', …' if lost[3:] else ''}). Merge into a model of more "
            "bits, --quantize int4 from the float model, or keep the blocks as a branch: diablo-export export"
        )


def print_survival(manifest: Mapping[str, Any]) -> None:
    """Print what each method that was tried keeps, a line each; nothing when asked to be quiet."""
    survival = manifest.get("survival")
    if survival is None or not log.isEnabledFor(logging.INFO):
        return
    plan = survival.get("plan")
    alike = "" if plan is None else ", with all modules merged alike"
    click.echo(f"survival on {survival['text']}{alike}:")
    for row in survival["tried"]:
        mark = "→" if row["method"] == survival["method"] else " "
        click.echo(
            f"{mark} {row['method']:<10}  gain {row['gain']:.3f}  cosine {row['cosine']:.3f}  KL {row['kl']:.2g} of "
            f"{row['base_kl']:.2g}  {row['codes_changed']:.1%} of codes changed  {row['seconds']:.1f} s"
        )
        if "tuned_kl" in row:
            click.echo(f"  KL to the float tuned model {row['tuned_kl']:.2g}")
    if plan is not None:
        _print_plan(plan)


def _print_plan(plan: Mapping[str, Any]) -> None:
    """What was decided, what it keeps, and what it costs."""
    said = ", ".join(f"{count} modules {choice}" for choice, count in plan["choices"].items())
    more = plan["bytes"] - plan["least_bytes"]
    click.echo(f"with {plan['file']}: {said}")
    click.echo(
        f"  gain {plan['gain']:.3f}  cosine {plan['cosine']:.3f}  KL {plan['kl']:.2g} of {plan['base_kl']:.2g}  "
        f"{plan['bytes']:,} bytes, {more:,} ({more / plan['least_bytes']:.1%}) more than all merged alike"
    )


def _missed(manifest: Mapping[str, Any], output: Path, calibrated: bool) -> str:
    survival = manifest["survival"]
    plan = survival.get("plan")
    best = plan or next(row for row in survival["tried"] if row["method"] == survival["method"])
    least = survival["min_survival"]
    said = (
        f"{output}: written, but the fine-tune does not survive as asked: gain {best['gain']:.3f} (asked: within "
        f"{1 - least:.3g} of 1), cosine {best['cosine']:.3f} (asked: {least:g})"
    )
    if plan is not None:
        return f"{said} with the plan that comes nearest, {plan['file']}. {_more_room(plan)}"
    ways = [] if survival["asked"] in _THOROUGH else ["--method auto"]
    ways += [] if calibrated else ["--calibration with text of the fine-tune's kind"]
    ways += [] if survival["method"] in (*ALGORITHMS, "layerwise") else ["--plan auto"]
    ways += [] if manifest["exporter"] == "given" else _finer(manifest["modules"])
    weak = f". The fine-tune is weak (KL {best['base_kl']:.2g} to its base): train it longer, or at a higher --lr"
    weak = weak if best["base_kl"] < _WEAK else ""
    return (
        f"{said} with {best['method']}. Give {', '.join(ways)}{', ' * bool(ways)}a lower --min-survival, or keep the "
        f"blocks as a branch: diablo-export export{weak}"
    )


def _finer(modules: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that give these weights a finer grid than they have."""
    grids = [part for entry in modules for part in entry.get("parts") or [entry] if part.get("bits")]
    return [
        *["a smaller --group-size"] * any(grid["group_size"] > min(GROUP_SIZES) for grid in grids),
        *["--asymmetric"] * any(grid["symmetric"] for grid in grids),
        *["--quantize int8"] * any(grid["bits"] < max(BITS) for grid in grids),
    ]


def _more_room(plan: Mapping[str, Any]) -> str:
    if plan["needs_bytes"] is not None:
        needs = f"A plan that keeps it takes up to {plan['needs_bytes']:,} bytes"
        return f"{needs}; raise --max-bytes, or lower --min-survival"
    if plan["max_bytes"] is not None:
        return "Raise --max-bytes, or lower --min-survival"
    return "Give more modules int8 or branch in it, or have it made anew with --plan auto"
