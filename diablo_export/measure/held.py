"""Limits from files: a `parity.toml` that a project keeps, and the report of its last release as a baseline."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diablo_export.errors import InputError
from diablo_export.measure.limits import FIGURES, PRECISIONS, parse

# by how much a figure may be worse than the baseline's, as a share of it, where no standard error is known: exports of
# one model on one machine repeat to the digit, and another processor's kernels move KL by less than this
_SLACK = 0.05
_EVERY = "all"


def from_toml(file: str | Path, precision: str) -> dict[str, float]:
    """The limits of a file for an export of this precision.

    The file has a table `[all]` and a table for each precision that needs its own, which goes before `[all]`:

        [all]
        "kl.mean" = 0.05
        [int4]
        "adapter.survival_gain" = 0.97

    Raises:
        InputError: no TOML, another table, a name that no figure has, or a value that is no number.
    """
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); --limits is a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: is no TOML: {error}") from error
    found: dict[str, float] = {}
    for name, table in tables.items():
        if name not in (_EVERY, *PRECISIONS) or not isinstance(table, dict):
            raise InputError(f"{file}: has {name!r}; its tables are [{_EVERY}] and [{'], ['.join(PRECISIONS)}]")
        limits = {key: _value(file, name, key, value) for key, value in table.items()}
        if name == _EVERY:
            found = limits | found
        elif name == precision:
            found |= limits
    return found


def _value(file: str | Path, table: str, name: str, value: Any) -> float:
    if isinstance(value, dict):  # kl.mean = 1 without quotes is a table in TOML
        raise InputError(f'{file}: [{table}] {name}: put names with a dot in quotes: "{name}.{next(iter(value), "…")}"')
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{file}: [{table}] {name} is {value!r}; a limit is a number")
    try:
        return parse([f"{name}={value}"])[name]
    except InputError as error:
        raise InputError(f"{file}: [{table}] {error}") from error


def baseline(file: str | Path) -> dict[str, Any]:
    """The report of an earlier parity run.

    Raises:
        InputError: no such report.
    """
    try:
        report: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        known = isinstance(report["checks"], list) and "kl" in report
    except FileNotFoundError as error:
        raise InputError(f"--baseline {file}: no such file; leave it out until there is a parity.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: cannot be read as a parity.json ({error!r})") from error
    if not known:
        raise InputError(f"{file}: is no parity.json: it has no checks")
    return report


def compare(report: dict[str, Any], earlier: Mapping[str, Any], file: str | Path | None) -> None:
    """Add to a report the checks of `no_worse`, and set its verdict anew.

    Raises:
        InputError: the two were not measured on the same data and adapters.
    """
    now, then = report["environment"], earlier.get("environment") or {}
    known = "samples_xxh3" in now and "samples_xxh3" in then
    same = known and now["samples_xxh3"] == then["samples_xxh3"]  # then the file's name is of no matter
    different = [
        f"{name} was {then.get(name)}, now {now.get(name)}"
        for name in ("data", "sequences", "tokens", "adapters")
        if now.get(name) != then.get(name) and not (same and name == "data")
    ]
    if known and not same and not different:
        different = [f"the data {now.get('data')} has changed since"]
    if different and report["kl"] is not None:
        raise InputError(
            f"{file}: was measured on other ground: {different[0]}; measure both with the same "
            "--data, --samples, --max-tokens, --seed and --adapter"
        )
    report["checks"] += no_worse(report, earlier)
    report["verdict"] = "pass" if all(check["pass"] for check in report["checks"]) else "fail"


def no_worse(report: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Checks that no figure is worse than in an earlier report, by more than noise.

    Noise is two standard errors where the reports give them (mean KL, perplexity), else a twentieth of the figure.
    Compared are mean KL, top-1 agreement, exported's perplexity or accuracy, survival gain and cosine.
    """
    now, then = _figures(report), _figures(earlier)
    checks = []
    for name, (sign, _) in _COMPARED.items():
        if name not in now or name not in then:
            continue
        noise = _noise(report, name)
        slack = noise if noise is not None else _SLACK * abs(then[name])
        limit = then[name] + slack if sign == "<=" else then[name] - slack
        held = now[name] <= limit if sign == "<=" else now[name] >= limit
        checks.append({"name": f"baseline.{name}", "value": now[name], "limit": limit, "pass": bool(held)})
    return checks


_COMPARED: Mapping[str, tuple[str, str]] = {
    name.removeprefix("baseline."): entry for name, entry in FIGURES.items() if name.startswith("baseline.")
}


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    adapter, gain = report.get("adapter") or {}, (report.get("adapter") or {}).get("survival_gain")
    found = {
        "kl.mean": (report.get("kl") or {}).get("mean"),
        "top1_agreement": report.get("top1_agreement"),
        "perplexity": (report.get("perplexity") or {}).get("exported"),
        "accuracy": (report.get("accuracy") or {}).get("exported"),
        "survival_gain.error": None if gain is None else abs(gain - 1),
        "survival_cosine": adapter.get("survival_cosine"),
    }
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _noise(report: Mapping[str, Any], name: str) -> float | None:
    distribution = report.get("distribution") or {}
    if name == "survival_gain.error":
        return 0.01  # of the share itself: exports of one adapter at other group sizes differ by as much
    if name == "perplexity":
        error = (distribution.get("perplexity_error") or {}).get("ratio")
        perplexity = (report.get("perplexity") or {}).get("exported")
        return 2 * error * perplexity if error and perplexity else None
    error = distribution.get("kl_error") if name == "kl.mean" else None
    return 2 * float(error) if error else None
