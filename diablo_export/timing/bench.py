"""The verb `bench`: what a branch costs. Times an export beside its own base, LoRA and a merge, in turns."""

from __future__ import annotations

import json as json_format
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diablo_export import runtime
from diablo_export.console import progress
from diablo_export.errors import ExportError, InputError, require
from diablo_export.manifest import read_manifest, versions
from diablo_export.measure.sources import is_branch, is_classifier, is_onnx
from diablo_export.output import new_file
from diablo_export.timing import sessions
from diablo_export.timing.report import draw
from diablo_export.timing.rounds import Times, interleave, once, ratio, summary, turn_length
from diablo_export.timing.sessions import VARIANTS, Variant, context, open_all, prepared

FORMAT_VERSION = 1
PREFILL = (128, 512)
_ADAPTER_FILES = ".onnx_adapter"


def bench(
    out: str | Path,
    *,
    adapter: str | None = None,
    merged: str | Path | None = None,
    prefill: Sequence[int] | None = None,
    past: int | None = 64,
    rounds: int = 20,
    seconds: float = 60,
    threads: int | None = None,
    provider: str = "CPUExecutionProvider",
    only: Sequence[str] = (),
    control: bool = False,
    json: str | Path | None = None,
    png: str | Path | None = None,
) -> dict[str, Any]:
    """Time a branch export beside its base.

    Args:
        out: the output folder of `export`.
        adapter: name of the adapter to time; None: the first.
        merged: folder of a merge of the same model and adapter into ONNX, to be timed as well.
        prefill: prompt lengths in tokens; of a classifier, lengths of its input. None: 128 and 512, or as many as the
            model can take.
        past: tokens in the KV cache when one more is decoded; None, or a classifier: decodes nothing.
        rounds: how often each variant gets its turn.
        seconds: begin no further round of a length after this time, but never fewer than three.
        threads: within an operator; None: onnxruntime's choice.
        provider: execution provider of onnxruntime.
        only: names of `sessions.VARIANTS` to time, beside the base; none: all, without `base-again`.
        control: `base-again` as well: time the base a second time, in a session of its own, to see how
            far apart equal things are.
        json: write the report here.
        png: draw the ratios here.

    Returns:
        The report; docs/bench.md describes it.

    Raises:
        InputError: `out` is no branch export, or lengths that the model cannot take.
        ExportError: onnxruntime refuses the base or the branch.
    """
    out, beside = Path(out), None if merged is None else Path(merged)
    manifest = read_manifest(out)
    name = _check(out, manifest, adapter)
    work = _work(out, _lengths(out) if prefill is None else prefill, past, is_classifier(manifest))
    _check_merged(out, manifest, beside)
    wanted = _wanted(only, control)
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; it must be at least 1")
    _check_files(json, png)
    chosen = runtime.load_adapter(out / "adapters" / f"{name}{_ADAPTER_FILES}")
    with progress("opening", 4 + control + (beside is not None)) as advance:
        variants, skipped = open_all(
            out, chosen, merged=beside, threads=threads, provider=provider, only=wanted, advance=advance
        )
    if not is_classifier(manifest) and not variants["base"].runner(out).has_cache:
        work = {title: sizes for title, sizes in work.items() if not sizes[1]}
    results = []
    with progress("timing", rounds * len(work)) as advance:
        for title, (tokens, before) in work.items():
            runs, repeats, failed = _runs(variants, out, beside, tokens, before)
            times = interleave(runs, repeats, rounds, seconds, advance)
            results.append(
                {"name": title, "tokens": tokens, "past": before, "rounds": len(times["base"].wall),
                 "runs_per_turn": repeats, "variants": figures(times, one_thread=threads == 1), "failed": failed}
            )  # fmt: skip
    report = {
        "format_version": FORMAT_VERSION,
        "model": str(out),
        "adapter": name,
        "variants": {title: _about(title, variants, skipped) for title in VARIANTS if title in wanted},
        "work": results,
        "environment": _environment(threads, provider),
    }
    if json is not None:
        with new_file(json, overwrite=True) as file:
            file.write_text(json_format.dumps(report, indent=1) + "\n", encoding="utf-8")
    if png is not None:
        draw(report, Path(png))
    return report


def figures(times: Mapping[str, Times], one_thread: bool) -> dict[str, dict[str, Any]]:
    """Per variant its seconds and its ratio to the base, by the clock and, on one thread, of processor time."""
    base = times["base"]
    found: dict[str, dict[str, Any]] = {}
    for name, taken in times.items():
        found[name] = {
            "seconds": summary(taken.wall), "ratio": ratio(taken.wall, base.wall), "turns": taken.wall.tolist()
        }  # fmt: skip
        if one_thread:
            found[name] |= {
                "processor_seconds": summary(taken.processor),
                "processor_ratio": ratio(taken.processor, base.processor),
                "processor_turns": taken.processor.tolist(),
            }
    return found


def _check(out: Path, manifest: Mapping[str, Any], adapter: str | None) -> str:
    """The name of the adapter to time; an error where `out` is nothing to be timed."""
    if not is_onnx(out) or not is_branch(manifest):
        raise InputError(
            f"{out}: its blocks are merged into the weights, which costs nothing at run time. Give the output folder "
            f"of diablo-export export, and this one, if it is ONNX, as --merged {out}"
        )
    files = {entry["name"]: entry.get("file", _ADAPTER_FILES) for entry in manifest["adapters"]}
    if not all(file.endswith(_ADAPTER_FILES) for file in files.values()):
        raise InputError(f"{out}: was exported for the web; export it without --for web to time it here")
    if adapter is not None and adapter not in files:
        raise InputError(f"--adapter {adapter}: no such adapter in {out}; there are {', '.join(files)}")
    return adapter or next(iter(files))


def _wanted(only: Sequence[str], control: bool) -> set[str]:
    """Names of what to time."""
    unknown = [name for name in only if name not in VARIANTS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: no such variant; there are {', '.join(VARIANTS)}")
    return {"base", *(only or [name for name in VARIANTS if name != "base-again"]), *(["base-again"] * control)}


def _check_merged(out: Path, manifest: Mapping[str, Any], merged: Path | None) -> None:
    if merged is None:
        return
    other = read_manifest(merged)
    if is_branch(other) or not (merged / "model.onnx").is_file():
        raise InputError(f"--merged {merged}: give the output folder of diablo-export merge, in ONNX (--format onnx)")
    ours, theirs = ({**(each.get("base") or {})} for each in (manifest, other))
    files, others = ours.get("files") or {}, theirs.get("files") or {}
    if any(files[name] != others[name] for name in files.keys() & others.keys()):
        raise InputError(
            f"--merged {merged}: was made of {theirs.get('path')}, and {out} of {ours.get('path')}, another model; "
            "their times are not to be compared"
        )


def _lengths(out: Path) -> list[int]:
    """Prompt lengths where nobody names any: those of PREFILL that the model can take, or all that it takes."""
    most = context(out)
    return [tokens for tokens in PREFILL if most is None or tokens <= most] or [most or PREFILL[0]]


def _check_files(json: str | Path | None, png: str | Path | None) -> None:
    """That the results can be written is known before minutes are spent on them."""
    for option, file in (("--json", json), ("--png", png)):
        if file is not None and not Path(file).resolve().parent.is_dir():
            raise InputError(f"{option} {file}: no such folder")
    if png is not None:
        require("matplotlib", "train")


def _work(out: Path, prefill: Sequence[int], past: int | None, classifier: bool) -> dict[str, tuple[int, int]]:
    """What to time: title → (tokens, tokens before them).

    Raises:
        InputError: more tokens than the model can take, or nothing to do.
    """
    title = "forward" if classifier else "prefill"
    work = {f"{title} {tokens}": (tokens, 0) for tokens in prefill}
    if past is not None and not classifier:
        work[f"decode at {past}"] = (1, past)
    most = context(out)
    long = [title for title, sizes in work.items() if min(sizes) < 0 or sizes[0] < 1 or (most and sum(sizes) > most)]
    if long:
        limit = "as many as the model can take" if most is None else str(most)
        raise InputError(
            f"{out}: cannot run {', '.join(long)}; lengths go from 1 to {limit} tokens, the new one included"
        )
    if not work:
        raise InputError("nothing to time: give prompt lengths, or a number of tokens before a decoded one")
    return work


def _runs(
    variants: Mapping[str, Variant], out: Path, merged: Path | None, tokens: int, past: int
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Each variant's run, tried once, how many make a turn, and what fails, with the reason. The base must not fail."""
    runs, failed, took = {}, {}, []
    for name, variant in variants.items():
        run = prepared(variant, merged if name == "merged" and merged else out, tokens, past)
        try:
            took.append(once(run)[0])
        except ExportError as error:
            if name == "base":
                raise
            failed[name] = str(error)
        else:
            runs[name] = run
    return runs, turn_length(took), failed


def _about(name: str, variants: Mapping[str, Variant], skipped: Mapping[str, str]) -> dict[str, Any]:
    about: dict[str, Any] = {"what": VARIANTS[name]}
    if name not in variants:
        return about | {"skipped": skipped[name]}
    count, size = sessions.parameters(variants[name])
    return about | {"parameters": count, "bytes": size}


def _environment(threads: int | None, provider: str) -> dict[str, Any]:
    library = runtime.find_library()
    return {
        **versions(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "provider": provider,
        "kernels": None if library is None else {"library": str(library), **runtime.describe_library(library)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
