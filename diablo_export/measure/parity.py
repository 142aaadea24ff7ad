"""The verb `parity`: is what was exported what was trained, and is the adapter alive in it?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diablo_export.errors import InputError, require_all
from diablo_export.manifest import read_manifest
from diablo_export.measure import certificate as certificates
from diablo_export.measure import foreign_sources, held, report, sources
from diablo_export.measure import limits as checking
from diablo_export.measure import markdown as markdowns
from diablo_export.measure import page as pages

if TYPE_CHECKING:
    from diablo_export.measure.one_adapter import Measured


def parity(
    out: str | Path,
    *,
    model: str | Path | None = None,
    adapter: Iterable[str] = (),
    data: str | Path | None = None,
    samples: int | None = None,
    max_tokens: int = 8192,
    steps: int = 32,
    limit: Mapping[str, float] | Iterable[str] = (),
    limits: str | Path | None = None,
    baseline: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    json: str | Path | None = None,
    junit: str | Path | None = None,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    certificate: bool = False,
    modules: bool = True,
    exported_base: str | Path | None = None,
) -> dict[str, Any]:
    """Compare an output folder with the tuned model in torch, write its parity.json and return that report.

    Args:
        out: what `merge` or `export` wrote; or an ONNX file, or a folder with one, that another program made.
        model: the base; None: the one that the manifest names.
        adapter: adapter folders in place of the manifest's, each `PATH`, `NAME=PATH`, or `NAME` to check that one only.
        data: JSON Lines or text to compare on; None: built-in prompts.
        samples: at most this many examples of it.
        max_tokens: at most this many tokens of it.
        steps: tokens to decode after each of a few prompts.
        limit: `NAME=VALUE` texts, or a mapping: checks to add, or to hold to another limit.
        limits: a parity.toml: limits for all exports and by precision; `limit` goes before it.
        baseline: the parity.json of an earlier export: no figure may be worse than there, by more than noise.
        seed: of the choice of examples.
        threads: of torch and onnxruntime; None: their choice.
        json: a second place for the report.
        junit: a file for the checks in JUnit XML.
        html: a file for the report as one page with pictures, which needs no network.
        markdown: a file for the report as a comment on a pull request.
        certificate: where every check held, certify the folder: golden rows, limits and hashes for `verify`.
        modules: also compare every linear module, on at most 256 tokens, and name the first that diverges.
        exported_base: for an export of another program: what that program makes of the base alone.

    Returns:
        The report. Its `verdict` is `fail` when a check failed; see `report.require_pass`.

    Raises:
        InputError: a folder, model, adapter, data file or limit that cannot be used.
    """
    out = Path(out)
    chosen = dict(limit) if isinstance(limit, Mapping) else checking.parse(limit)
    checking.parse(f"{name}={value}" for name, value in chosen.items())
    if steps < 1 or max_tokens < 1 or (samples is not None and samples < 1):
        raise InputError(f"--steps {steps}, --max-tokens {max_tokens}, --samples {samples}: each must be 1 or more")
    earlier = held.baseline(baseline) if baseline is not None else None
    manifest = _manifest(out, adapter, exported_base)
    folders = sources.adapter_folders(manifest, adapter)
    base = sources.base_folder(manifest, model, folders)
    strange = bool(manifest.get("foreign"))
    hashes = (foreign_sources if strange else sources).hashes(out, manifest, base, folders)
    if certificate and (fault := _uncertifiable(out, manifest)):
        raise InputError(f"{out}: --certificate is for {fault}")
    kind = {"branch": sources.is_branch(manifest), "classifier": sources.is_classifier(manifest)}
    kind |= {"exported_base": bool(manifest.get("exported_base", True)), "same_base": manifest.get("format") == "hf"}
    defaults = checking.defaults(sources.precision(out, manifest), block_dtype=sources.block_dtype(manifest), **kind)
    kept = held.from_toml(limits, sources.precision(out, manifest)) if limits is not None else {}
    require_all("train", "torch", "transformers", "accelerate")  # only once the input is known good
    from diablo_export.measure import foreign
    from diablo_export.measure.one_adapter import measure, using_threads

    counts = {"files": len(hashes["changed"]), "sources": len(hashes["sources_changed"])}
    counts = {} if strange else counts  # nobody said what they should be
    bounds: dict[str, Any] = {"data": data, "samples": samples, "max_tokens": max_tokens, "seed": seed}
    bounds |= {"steps": steps, "threads": threads, "certify": certificate, "modules": modules}
    look: Callable[..., Measured] = functools.partial(measure, out)
    if strange:
        look = functools.partial(foreign.measure, exported_base=exported_base)
    with using_threads(threads):
        measured = [look(manifest, base, name, folder, **bounds) for name, folder in folders.items()]
    result = _report(measured, counts, defaults, kept, chosen, hashes)
    if earlier is not None:
        held.compare(result, earlier, baseline)
    if out.is_dir():
        certificates.revoke(out)  # what is checked anew is not what was certified
    _write(result, out, json, junit, html, markdown)
    if certificate and result["verdict"] == "pass":
        cases = [case for one in measured for case in one.golden]
        certificates.write(out, cases, sources.precision(out, manifest), result["environment"], measured[0].graph)
    return result


def _write(result: dict[str, Any], out: Path, *files: str | Path | None) -> None:
    """Write the report into the folder, and where asked for as JSON, JUnit XML, HTML and Markdown, in this order."""
    json, junit, html, markdown = (file if file is None else Path(file) for file in files)
    title = out.resolve().name
    report.write_json(result, foreign_sources.report_file(out))
    if json is not None:
        report.write_json(result, json)
    if junit is not None:
        report.write_junit(result, junit)
    if html is not None:
        report.write(html, pages.page(result, title))
    if markdown is not None:
        report.write(markdown, markdowns.markdown(result, title))


def _manifest(out: Path, adapter: Iterable[str], exported_base: str | Path | None) -> dict[str, Any]:
    """The manifest of a folder, or what one would say of another program's export."""
    if foreign_sources.applies(out):
        return foreign_sources.manifest(out, adapter, exported_base)
    manifest = read_manifest(out)
    if exported_base is not None:
        raise InputError(
            f"--exported-base {exported_base}: is for exports of other programs; {out} was made by diablo-export, "
            "which knows what it makes of the base"
        )
    return manifest


def _uncertifiable(out: Path, manifest: Mapping[str, Any]) -> str | None:
    """Why a folder cannot be certified; None where it can."""
    if manifest.get("foreign"):
        return None if out.is_dir() else "folders: every file of one is hashed; put the model into one of its own"
    if manifest.get("for") == "web" or not sources.is_onnx(out):
        other = "exports for web" if sources.is_onnx(out) else "Hugging Face folders"
        return f"what onnxruntime runs from Python, so not for {other}"
    return None


def _report(
    measured: list[Measured],
    counts: Mapping[str, float],
    defaults: Mapping[str, float],
    kept: Mapping[str, float],
    chosen: Mapping[str, float],
    hashes: dict[str, Any],
) -> dict[str, Any]:
    """One report of all adapters: the checks of each, and the figures of the one that does worst.

    Raises:
        InputError: a limit was asked for a figure that this export does not have.
    """
    checks: list[dict[str, Any]] = []
    ranks: list[tuple[int, float]] = []  # failed checks, then mean KL
    for one in measured:
        figures = {**counts, **one.figures}
        absent = sorted(set(chosen) - set(figures))
        if absent and figures["runs"]:
            raise InputError(f"--limit {absent[0]}: not measured here; there are: {', '.join(sorted(figures))}")
        bounds = {**checking.widened(defaults, one.errors), **kept, **chosen}
        found = checking.check(figures, bounds, f"@{one.name}" if len(measured) > 1 else "")
        checks += found
        ranks.append((sum(not check["pass"] for check in found), figures.get("kl.mean", 0.0)))
    worst = measured[max(range(len(measured)), key=ranks.__getitem__)]
    return report.make(
        checks=checks,
        figures=worst.parts,
        classifier=worst.classifier,
        environment=worst.environment | {"adapters": [one.name for one in measured]},
        hashes=hashes,
    )
