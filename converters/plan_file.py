"""plan.toml: what a merge does with each module, as a file to read, to edit, and to do again.

    format_version = 1
    base = "…"        # XXH3-128 of the fingerprints of the adapted base weights
    adapter = "…"     # SHA-256 of adapter_model.safetensors
    grid = "int4 in groups of 32, symmetric"
    method = "calibrated"

    [modules]
    "model.layers.0.mlp.up_proj" = {choice = "int4", bytes = 4608, gain = 0.99, cosine = 0.99, nats = 1.2e-05}
    "model.layers.0.mlp.down_proj" = "branch"     # the choice alone will do

What is measured is for the reader; choices and method are what a merge takes from it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from diablo_export.adapter import WEIGHTS, Adapter, file_sha256
from diablo_export.errors import InputError

PLAN = "plan.toml"
BRANCH = "branch"
FORMAT_VERSION = 1
_SHOWN = 10  # faults that are listed before the rest is counted
_HEAD = """\
# What diablo-export merge does with each module. Change a choice and do it again with --plan and this file.
#   int2, int4, int8  merged, in so many bits
#   branch            the blocks stay beside the weights, which keep their bits
#   float             merged exactly: the model holds this weight in float
"""
_COLUMNS = """\
# bytes: of codes, scales, zero points and blocks. gain, cosine: what is left of the adapter in the module's output.
# nats: about what the module's merge at the base's bits adds to the KL divergence of the logits.
"""


@dataclass(frozen=True)
class Plan:
    """What to do with each module of one adapter on one base.

    Attributes:
        base: what tells the base, `base_mark`.
        adapter: SHA-256 of the adapter's weights.
        grid: of the base, in words.
        method: how codes are chosen.
        choices: by module: int2, int4 or int8 for a merge in so many bits, branch, or float.
    """

    base: str
    adapter: str
    grid: str
    method: str
    choices: dict[str, str]


def base_mark(adapter: Adapter) -> str:
    """One XXH3-128, in hex, for the base that an adapter was trained on: of its weights' fingerprints."""
    known = [(name, one.fingerprint and one.fingerprint.to_json()) for name, one in sorted(adapter.modules.items())]
    return xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True).encode())


def adapter_mark(adapter: Adapter) -> str:
    """SHA-256 of the adapter's weights."""
    assert adapter.path is not None
    return file_sha256(adapter.path / WEIGHTS)


def write_plan(file: Path, plan: Plan, measured: Mapping[str, Any], modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a plan.

    Args:
        file: to write.
        plan: what to do.
        measured: of the whole model, for the reader.
        modules: by module, for the reader.
    """
    lines = [_HEAD, f"format_version = {FORMAT_VERSION}"]
    lines += [f"{name} = {_toml(getattr(plan, name))}" for name in ("base", "adapter", "grid", "method")]
    lines += ["", "[measured]", *(f"{name} = {_toml(value)}" for name, value in measured.items())]
    lines += ["", "[modules]", _COLUMNS.rstrip()]
    for name, choice in plan.choices.items():
        figures = {"choice": choice, **modules.get(name, {})}
        said = ", ".join(f"{key} = {_toml(value)}" for key, value in figures.items())
        lines.append(f"{_toml(name)} = {{{said}}}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_plan(file: str | Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: no TOML, or not a plan's.
    """
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); --plan is auto, or the plan.toml of a merge") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: is no TOML: {error}") from error
    if found.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {found.get('format_version')!r}, this program reads {FORMAT_VERSION}; make the "
            "plan again with --plan auto"
        )
    texts = {name: found.get(name) for name in ("base", "adapter", "grid", "method")}
    faults = [f"{name} is {value!r}, and must be a text" for name, value in texts.items() if not isinstance(value, str)]
    modules = found.get("modules")
    if not isinstance(modules, dict) or not modules:
        faults.append("it has no table [modules]")
        modules = {}
    chosen = {name: entry.get("choice") if isinstance(entry, dict) else entry for name, entry in modules.items()}
    faults += [f"{name}: choice is {one!r}" for name, one in chosen.items() if not isinstance(one, str)]
    if faults:
        raise InputError(f"{file}: is no plan of a merge: {_listed(faults)}; make one with --plan auto")
    return Plan(choices=chosen, **texts)  # type: ignore[arg-type]


def check_plan(
    file: object, plan: Plan, own: Plan, allowed: Mapping[str, Collection[str]], methods: Collection[str]
) -> None:
    """Refuse a plan that is not for this base, adapter and grid, or that asks for what there is not.

    Args:
        file: where it was read, for the message.
        plan: the plan.
        own: base, adapter and grid of the merge that is to follow it.
        allowed: what can be done with each module.
        methods: by which codes can be chosen.

    Raises:
        InputError: names everything that is wrong.
    """
    faults = []
    if plan.base != own.base:
        faults.append("it was made for another base: the adapted weights have other fingerprints")
    elif plan.adapter != own.adapter:
        faults.append(
            f"it was made for another adapter: SHA-256 {plan.adapter[:12]}…, this one's is {own.adapter[:12]}…"
        )
    if plan.grid != own.grid:
        faults.append(f"it was made for weights that are {plan.grid}, and here they are {own.grid}")
    if plan.method not in methods:
        faults.append(f"method is {plan.method!r}; it can be {', '.join(methods)}")
    unknown = [name for name in plan.choices if name not in allowed]
    faults += [f"{name}: the adapter has no such module" for name in unknown]
    faults += [f"{name}: is not in the plan" for name in allowed if name not in plan.choices]
    for name, choice in plan.choices.items():
        if name in allowed and choice not in allowed[name]:
            faults.append(f"{name}: choice is {choice!r}; it can be {', '.join(allowed[name])}")
    if faults:
        raise InputError(f"{file}: does not fit: {_listed(faults)}. Mend it, or make one with --plan auto")


def _listed(faults: list[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more


def _toml(value: Any) -> str:
    """A text, truth value or number as TOML spells it; numbers to six digits."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)  # nan, inf
    text = f"{value:.6g}"
    return text if any(mark in text for mark in ".e") else f"{text}.0"
