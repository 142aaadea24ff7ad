"""A parity report as one HTML page that needs no network: checks, pictures as SVG, texts with their first difference.

Light or dark as the reader's system asks, and readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diablo_export.measure.report import explained, shown, whose

_FIGURES = ("logits", "kl", "decode", "perplexity", "accuracy", "adapter")
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --card: #fff; --back: #f4f6f8;
  --good: #1a7f37; --bad: #c2252d; --bar: #3567c4; --mark: #ffd9d6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa5b1; --line: #333a42; --card: #1c2127;
  --back: #12161a; --good: #4ac26b; --bad: #ff7b72; --bar: #7aa5f5; --mark: #6b2320 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 0 0 .7rem }
section, header { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin-bottom: 1rem }
.verdict { font-weight: 700; font-size: 1.1rem } .pass { color: var(--good) } .fail { color: var(--bad) }
.soft { color: var(--soft) } .wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% } th { text-align: left; color: var(--soft); font-weight: 600 }
td, th { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
code { font-size: .92em; overflow-wrap: anywhere } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin-bottom: 1.2rem }
.texts div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .7rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
.texts b { display: block; color: var(--soft); font-size: .85rem; white-space: normal }
.texts mark { background: var(--mark); color: inherit } .prompt { margin: 0 0 .4rem; white-space: pre-wrap }
section > p:last-child, header > p:last-child { margin-bottom: 0 } .check > td { border-bottom: 0; padding-bottom: 0 }
@media (max-width: 36rem) { td, th { padding-right: .4rem; font-size: .9em } .texts div { padding: .5rem } }
"""


def page(report: Mapping[str, Any], title: str) -> str:
    """The page; `title` names what was checked."""
    parts = [_head(report, title), _checks(report["checks"])]
    distribution = report.get("distribution")
    if distribution:
        parts += [_histogram(distribution["kl_histogram"]), _by_length(distribution.get("by_length") or [])]
    if report["modules"]:
        parts += [_depth(report["modules"], report["first_divergent_module"]), _heat(report["modules"])]
    if report["texts"]:
        parts.append(_texts(report["texts"]))
    parts += [_figures(report), _environment(report["environment"])]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Parity of {escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{''.join(parts)}</main></body></html>\n"
    )


def _head(report: Mapping[str, Any], title: str) -> str:
    checks, passed = report["checks"], report["verdict"] == "pass"
    held = sum(check["pass"] for check in checks)
    kind, word = ("pass", "PASS") if passed else ("fail", "FAIL")
    fault = report["environment"].get("fault")
    changed = [*(report["hashes"].get("changed") or []), *(report["hashes"].get("sources_changed") or [])]
    more = f"<p>{escape(fault)}</p>" if fault else ""
    more += f"<p>Changed since the export: <code>{escape(', '.join(changed))}</code></p>" if changed else ""
    more += f"<p>What follows the checks is{escape(whose(report))}.</p>" if whose(report) else ""
    return (
        f'<header><h1>Parity of {escape(title)}</h1><p class="verdict {kind}">{word}: {held} of {len(checks)} checks '
        f"held</p>{more}</header>\n"
    )


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for check in checks:
        sign, meaning = explained(check)
        kind, word = ("pass", "pass") if check["pass"] else ("fail", "FAIL")
        limit = f"{sign} {shown(check['limit'])}"
        rows.append(
            f'<tr class="check"><td class="{kind}">{word}</td><td><code>{escape(check["name"])}</code></td>'
            f'<td class="number">{shown(check["value"])}</td><td class="number">{limit}</td></tr>'
            f'<tr><td></td><td class="soft" colspan="3">{escape(meaning)}</td></tr>'
        )
    head = '<tr><th></th><th>check</th><th class="number">value</th><th class="number">limit</th></tr>'
    return f'<section><h2>Checks</h2><div class="wide"><table>{head}{"".join(rows)}</table></div></section>\n'


def _histogram(histogram: Mapping[str, Sequence[float]]) -> str:
    """Bars of the positions between powers of ten of KL."""
    edges = histogram["edges"]
    bins = list(zip((f"<{edges[0]:.0e}", *(f"{edge:.0e}" for edge in edges)), histogram["counts"], strict=True))
    full = [index for index, (_, count) in enumerate(bins) if count]
    bins = bins[max(0, full[0] - 1) : full[-1] + 2]  # and an empty one at either side
    width, height, base = 720, 190, 150
    step, most = width / len(bins), max(count for _, count in bins)
    bars = []
    for index, (name, count) in enumerate(bins):
        tall = (base - 20) * count / most
        left = index * step + 3
        bars.append(
            f'<rect x="{left:.1f}" y="{base - tall:.1f}" width="{step - 6:.1f}" height="{tall:.1f}" fill="var(--bar)">'
            f"<title>{escape(name)}: {count} positions</title></rect>"
            f'<text x="{left + step / 2 - 3:.1f}" y="{base + 14}" text-anchor="middle">{escape(name)}</text>'
        )
        if count:
            x, y = left + step / 2 - 3, base - tall - 4
            bars.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{count}</text>')
    picture = _svg(width, height, "".join(bars), "Histogram of KL")
    return (
        f'<section><h2>KL(tuned ‖ exported), by position</h2><div class="wide">{picture}</div>'
        '<p class="soft">Nats; each bar begins at the power of ten below it.</p></section>\n'
    )


def _by_length(parts: Sequence[Mapping[str, Any]]) -> str:
    """Mean KL of short and of long sequences; nothing where all are of one kind."""
    if len(parts) < 2:
        return ""
    rows = "".join(
        f"<tr><td>{'–'.join(map(str, dict.fromkeys(part['tokens'])))}</td>"
        f'<td class="number">{part["sequences"]}</td><td class="number">{part["positions"]}</td>'
        f'<td class="number">{shown(part["kl_mean"])}</td></tr>'
        for part in parts
    )
    head = '<tr><th>tokens</th><th class="number">sequences</th><th class="number">positions</th>'
    head += '<th class="number">mean KL</th></tr>'
    return (
        f'<section><h2>KL by length of the sequence</h2><div class="wide"><table>{head}{rows}</table></div></section>\n'
    )


def _depth(modules: Sequence[Mapping[str, Any]], first: str | None) -> str:
    """Local and inherited error of each module, in the order of the network: higher bars are nearer to tuned."""
    pairs = [("local_sqnr_db", "var(--bar)", 1.0), ("inherited_sqnr_db", "var(--soft)", 0.5)]
    values = [module.get(key) for module in modules for key, _, _ in pairs]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return ""
    width, base, most = 720, 150, max(40.0, *finite)
    step, shapes = width / len(modules), _layer_names([module["name"] for module in modules], width, base)
    for index, module in enumerate(modules):
        for key, colour, share in pairs:
            value = module.get(key)
            tall = base - 10 if value is None else max(0.0, min(1.0, value / most)) * (base - 10)
            red = module["name"] == first and key == "local_sqnr_db"
            shapes.append(
                f'<rect x="{(index + 0.1) * step:.1f}" y="{base - tall:.1f}" width="{0.8 * step * share:.1f}" '
                f'height="{tall:.1f}" fill="{"var(--bad)" if red else colour}" opacity="{1.1 - share / 2:.2f}">'
                f"<title>{escape(module['name'])}: {escape(key)} {shown(value)}</title></rect>"
            )
    picture = _svg(width, base + 20, "".join(shapes), "Error of each module")
    said = f" The first that diverges is <code>{escape(first)}</code>, in red." if first else ""
    return (
        f'<section><h2>Error by depth</h2><div class="wide">{picture}</div><p class="soft">Signal to noise in '
        f"decibels, up to {most:.0f}: each module on the same input as tuned's (blue), and with what it "
        f"inherits (grey), by layer.{said}</p></section>\n"
    )


def _layer_names(names: Sequence[str], width: float, base: float) -> list[str]:
    """The numbers of the layers under the bars of their first modules, as many as there is room for."""
    layers = [_split(name)[0] for name in names]
    starts = [index for index, layer in enumerate(layers) if index == 0 or layers[index - 1] != layer]
    every = -(-len(starts) * 34 // int(width))  # a number takes up to 34 of the picture's units
    return [
        f'<text x="{(index + 0.1) * width / len(names):.1f}" y="{base + 14}">{escape(layers[index])}</text>'
        for index in starts[::every]
        if layers[index].isdigit()
    ]


def _heat(modules: Sequence[Mapping[str, Any]]) -> str:
    """Survival of each module, layers down and kinds across."""
    cells: dict[tuple[str, str], float] = {}
    for module in modules:
        gain = module.get("survival_gain")
        if gain is not None:
            layer, _, kind = _split(module["name"])
            cells[layer, kind] = gain
    if not cells:
        return ""
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    kinds = list(dict.fromkeys(kind for _, kind in cells if kind)) or [""]
    rows = []
    for layer in layers:
        alone = (layer, "") in cells  # a head belongs to no layer, and is in no column
        row = _cell(cells[layer, ""]) if alone else "".join(_cell(cells.get((layer, kind))) for kind in kinds)
        rows.append(f"<tr><th>{escape(layer)}</th>{row}</tr>")
    head = "".join(f'<th class="number">{escape(kind)}</th>' for kind in kinds)
    return (
        '<section><h2>Survival gain of each module</h2><div class="wide"><table>'
        f"<tr><th></th>{head}</tr>{''.join(rows)}</table></div></section>\n"
    )


def _cell(gain: float | None) -> str:
    if gain is None:
        return "<td></td>"
    off = min(1.0, abs(gain - 1) * 4)  # a quarter lost is as bad as all
    colour = f"color-mix(in srgb, var(--bad) {off * 70:.0f}%, transparent)"
    return f'<td class="number" style="background: {colour}">{gain:.3f}</td>'


def _split(name: str) -> tuple[str, str, str]:
    """("3", ".", "self_attn.q_proj") of model.layers.3.self_attn.q_proj; a name without a number is its own layer."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (name, "", "") if at is None else (parts[at], ".", ".".join(parts[at + 1 :]))


def _texts(texts: Sequence[Mapping[str, Any]]) -> str:
    several = len({text["adapter"] for text in texts}) > 1
    parts = []
    for text in texts:
        name = f" (adapter {escape(text['adapter'])})" if several else ""
        starts = {"base": None, "tuned": None, "exported": text["first_difference"]}
        boxes = "".join(f"<div><b>{model}</b>{_marked(text[model].rstrip(), at)}</div>" for model, at in starts.items())
        parts.append(f'<p class="prompt">{escape(text["prompt"])}{name}</p><div class="texts">{boxes}</div>')
    note = "Greedy; what exported says after its first difference from tuned is marked."
    return f'<section><h2>What they say</h2>{"".join(parts)}<p class="soft">{note}</p></section>\n'


def _marked(text: str, start: int | None) -> str:
    if start is None:
        return escape(text)
    return f"{escape(text[:start])}<mark>{escape(text[start:])}</mark>"


def _figures(report: Mapping[str, Any]) -> str:
    rows = []
    for name in (*_FIGURES, "distribution"):
        for key, value in (report.get(name) or {}).items():
            if key not in ("kl_histogram", "by_length"):  # in sections of their own
                inner = value if isinstance(value, Mapping) else {"": value}
                rows += [(f"{name}.{key}{'.' if part else ''}{part}", shown(number)) for part, number in inner.items()]
    if report["top1_agreement"] is not None:
        rows.append(("top1_agreement", shown(report["top1_agreement"])))
    table = "".join(f'<tr><td><code>{escape(a)}</code></td><td class="number">{b}</td></tr>' for a, b in rows)
    title = f"<h2>Figures{escape(whose(report))}</h2>"
    return f'<section>{title}<div class="wide"><table>{table}</table></div></section>\n' if rows else ""


def _environment(environment: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(key))}</td><td><code>{escape(_plain(value))}</code></td></tr>"
        for key, value in environment.items()
        if key != "fault" and value is not None
    )
    return f'<section><h2>How it was measured</h2><div class="wide"><table>{rows}</table></div></section>\n'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _svg(width: float, height: float, inside: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}" '
        f'style="min-width: 30rem">{inside}</svg>'
    )
