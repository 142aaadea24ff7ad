"""A parity report as Markdown, for the comment on a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diablo_export.measure.report import explained, modules_line, shown, whose

_FIGURES = ("logits", "kl", "decode", "perplexity", "accuracy", "adapter")


def markdown(report: Mapping[str, Any], title: str) -> str:
    """The verdict, every check, the figures, the texts; `title` names what was checked."""
    checks = report["checks"]
    held = sum(check["pass"] for check in checks)
    mark = "✅" if report["verdict"] == "pass" else "❌"
    lines = [f"## {mark} Parity of {_text(title)}: {held} of {len(checks)} checks held", ""]
    lines += _table(("", "check", "value", "limit", "what"), [_row(check) for check in checks])
    for part in ("changed", "sources_changed"):
        if report["hashes"].get(part):
            lines += ["", f"Changed since the export: {', '.join(f'`{name}`' for name in report['hashes'][part])}"]
    if report["environment"].get("fault"):
        lines += ["", f"> {_text(report['environment']['fault'])}"]
    if (modules := modules_line(report)) is not None:
        lines += ["", f"Modules: {_text(modules)}"]
    rows = [(name, _figures(report[name])) for name in _FIGURES if report.get(name)]
    if report["top1_agreement"] is not None:
        rows.append(("top-1 agreement", shown(report["top1_agreement"])))
    if rows:
        summary = f"<details><summary>{_text(f'Figures{whose(report)}')}</summary>"
        lines += ["", summary, "", *_table(("figure", ""), rows), "", "</details>"]
    if report["texts"]:
        names = ("prompt", "base", "tuned", "exported")
        cells = [tuple(_text(text[name]) for name in names) for text in report["texts"]]
        lines += ["", "<details><summary>Texts</summary>", "", *_table(names, cells), "", "</details>"]
    return "\n".join(lines) + "\n"


def _row(check: Mapping[str, Any]) -> tuple[str, ...]:
    sign, meaning = explained(check)
    mark = "✅" if check["pass"] else "❌"
    return mark, f"`{check['name']}`", shown(check["value"]), f"{sign} {shown(check['limit'])}", _text(meaning)


def _figures(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(titles), _line(["---"] * len(titles)), *(_line(row) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """Text that cannot break out of a cell, nor be taken for markup."""
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
