"""A parity report as parity.json, as JUnit XML and as a table. No measuring here."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diablo_export.errors import CheckFailed, OutputError
from diablo_export.manifest import plain
from diablo_export.measure.limits import FIGURES

if TYPE_CHECKING:
    from rich.console import Group

FORMAT_VERSION = 1
_SHOWN = ("logits", "kl", "decode", "perplexity", "accuracy", "adapter")


def make(
    *,
    checks: list[dict[str, Any]],
    figures: Mapping[str, Any],
    classifier: bool,
    environment: dict[str, Any],
    hashes: dict[str, Any],
) -> dict[str, Any]:
    """The report, with every key of the format; what could not be measured is None.

    Args:
        checks: `{"name", "value", "limit", "pass"}` each.
        figures: logits, kl, top1_agreement, perplexity, decode, accuracy, adapter: those that were measured.
        classifier: accuracy stands in place of perplexity and decode.
        environment: versions, provider, threads, platform, and what was compared.
        hashes: SHA-256 of the files.
    """
    task = ("accuracy",) if classifier else ("perplexity", "decode")
    measured = ("logits", "kl", "top1_agreement", *task, "adapter")
    report = {
        "format_version": FORMAT_VERSION,
        "verdict": "pass" if checks and all(check["pass"] for check in checks) else "fail",
        "checks": checks,
        **{name: figures.get(name) for name in measured},
        "modules": figures.get("modules") or [],
        "first_divergent_module": figures.get("first_divergent_module"),
        "environment": environment,
        "hashes": hashes,
        "distribution": figures.get("distribution"),
        "texts": figures.get("texts") or [],
    }
    whole: dict[str, Any] = plain(report)
    return whole


def failures(report: Mapping[str, Any]) -> str:
    """The failed checks in one line: name, value, limit; empty when none failed."""
    return ", ".join(
        f"{check['name']} {shown(check['value'])} (limit {explained(check)[0]} {shown(check['limit'])})"
        for check in report["checks"]
        if not check["pass"]
    )


def require_pass(report: Mapping[str, Any], folder: Path) -> None:
    """Raise when the verdict is `fail`.

    Raises:
        CheckFailed: names the failed checks with their values and limits.
    """
    if report["verdict"] == "pass":
        return
    changed = report["hashes"].get("changed") or []
    note = f"; changed since the export: {', '.join(changed)}" if changed else ""
    fault = report["environment"].get("fault")
    note += f"; {fault}" if fault else ""
    first = report["first_divergent_module"]
    note += f"; the first module that diverges is {first}" if first else ""
    raise CheckFailed(f"{folder}: parity failed: {failures(report)}{note}")


def write_json(report: Mapping[str, Any], file: Path) -> None:
    """Write the report, all of it or nothing."""
    write(file, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_junit(report: Mapping[str, Any], file: Path) -> None:
    """Write JUnit XML: a test case per check."""
    checks = report["checks"]
    failed = sum(not check["pass"] for check in checks)
    counts = {"tests": str(len(checks)), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites", {"name": "diablo-export", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "parity", **counts})
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "parity", "name": check["name"]})
        said = f"{shown(check['value'])}, limit {explained(check)[0]} {shown(check['limit'])}: {explained(check)[1]}"
        if check["name"].startswith("modules."):
            said += f"; {modules_line(report)}"
        if not check["pass"]:
            ElementTree.SubElement(case, "failure", {"message": said})
        ElementTree.SubElement(case, "system-out").text = said
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
    write(file, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def table(report: Mapping[str, Any]) -> Group:
    """What a person reads: the checks, the figures, the verdict; fits 80 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    checks = Table(title="Checks", title_justify="left", show_edge=False, pad_edge=False)
    checks.add_column("check", overflow="fold")
    checks.add_column("value", justify="right", no_wrap=True)
    checks.add_column("limit", justify="right", no_wrap=True)
    checks.add_column("", no_wrap=True)
    for check in report["checks"]:
        mark = Text("pass", "green") if check["pass"] else Text("FAIL", "bold red")
        limit = f"{explained(check)[0]} {shown(check['limit'])}"
        checks.add_row(check["name"], shown(check["value"]), limit, mark)
    figures = Table(
        title=f"Figures{whose(report)}", title_justify="left", show_header=False, show_edge=False, pad_edge=False
    )
    figures.add_column(no_wrap=True)
    figures.add_column(overflow="fold")
    for name in _SHOWN:
        if report.get(name) is not None:
            figures.add_row(name, "  ".join(f"{key} {shown(value)}" for key, value in report[name].items()))
    if report["top1_agreement"] is not None:
        figures.add_row("top-1 agreement", shown(report["top1_agreement"]))
    if (modules := modules_line(report)) is not None:
        figures.add_row("modules", modules)
    passed = report["verdict"] == "pass"
    count = sum(check["pass"] for check in report["checks"])
    verdict = Text(
        f"{'PASS' if passed else 'FAIL'}: {count} of {len(report['checks'])} checks held",
        "bold green" if passed else "bold red",
    )
    return Group(checks, Text(), figures, Text(), verdict)


def whose(report: Mapping[str, Any]) -> str:
    """Of which adapter all but the checks is, where an export holds several."""
    names = report["environment"].get("adapters") or []
    return f" of {report['environment']['adapter']}, the worst of {len(names)} adapters" if len(names) > 1 else ""


def modules_line(report: Mapping[str, Any]) -> str | None:
    """How many modules were looked into, and the first that diverges; None where none was."""
    missing = len(report["environment"].get("modules_not_found") or {})
    rows = report.get("modules") or []
    if not rows and not missing:
        return None
    faults = [row["name"] + f" ({row['fault']})" for row in rows if row["fault"]]
    said = f"{len(rows)} looked into, {len(faults)} faulty" + (f", the first {faults[0]}" if faults else "")
    return said + (f"; {missing} not found in the graph" if missing else "")


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}; choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def explained(check: Mapping[str, Any]) -> tuple[str, str]:
    """The sign of a check's limit, and what its figure means."""
    sign, meaning = FIGURES.get(str(check["name"]).partition("@")[0], ("", ""))
    return sign.replace("<=", "≤").replace(">=", "≥"), meaning


def shown(value: Any) -> str:
    """A figure as a person reads it: four digits."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
