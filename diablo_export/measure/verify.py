"""The verb `verify`: does a certified export do on this machine what it did when it was certified?

onnxruntime and numpy are all it needs; where nothing else is installed: `python -m diablo_export.measure.verify OUT`.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diablo_export import __version__, runtime
from diablo_export.console import print_what_fits
from diablo_export.errors import CheckFailed, ExportError, InputError, require
from diablo_export.measure import certificate, golden
from diablo_export.measure.golden import Golden
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape

if TYPE_CHECKING:
    import onnxruntime

FORMAT_VERSION = 1
# these build an engine of their own for minutes, or are a cloud's: only where asked for
_NOT_BY_ITSELF = ("TensorrtExecutionProvider", "NvTensorRtRtxExecutionProvider", "AzureExecutionProvider")
# a branch whose logits move by less than float32 kernels differ among themselves is not alive
_ALIVE = 1e-4
_AT_LEAST = ("runs", "alive")  # 1 is good, as in parity.json; every other figure is held to an upper limit


def verify(out: str | Path, *, provider: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Check an export against its certificate: every file's hash, and its golden rows with every adapter.

    Args:
        out: a folder that `parity --certificate` certified.
        provider: execution provider to run on, with or without "ExecutionProvider"; None: the best that this
            onnxruntime has. What it cannot run falls to the CPU.
        threads: of onnxruntime; None: its choice.

    Returns:
        `{"format_version", "verdict", "checks", "environment"}`: checks as in parity.json. Nothing is run where a file
        changed, and the checks say which.

    Raises:
        InputError: no certificate, or no such provider.
    """
    folder = Path(out)
    body, cases, changed = certificate.read(folder)
    checks = [_check("files", len(changed), 0)]
    environment: dict[str, Any] = {"changed": changed, "precision": body.get("precision"), "versions": _versions()}
    environment["certified_with"] = body.get("environment")
    if not changed:
        limits = [case["limits"] for case in body["cases"]]
        try:
            graph = body.get("graph") or {}
            session = runtime.session(
                folder / graph.get("file", "model.onnx"), providers=_providers(provider), threads=threads
            )
            environment["provider"] = session.get_providers()[0]
            environment["kernels"] = str(runtime.find_library() or "") or None
            checks += [_check("runs", 1, 1), *_compare(folder, _plain(folder, session, graph), cases, limits)]
        except ExportError as error:
            environment["fault"] = str(error)
            checks.append(_check("runs", 0, 1))
    verdict = "pass" if all(check["pass"] for check in checks) else "fail"
    return {"format_version": FORMAT_VERSION, "verdict": verdict, "checks": checks, "environment": environment}


def require_pass(report: dict[str, Any], folder: Path) -> None:
    """Raise when the verdict is `fail`.

    Raises:
        CheckFailed: names the failed checks with their values and limits, and changed files.
    """
    if report["verdict"] == "pass":
        return
    failed = [f"{c['name']} {_shown(c['value'])} (limit {_limit(c)})" for c in report["checks"] if not c["pass"]]
    environment = report["environment"]
    more = [f"changed since it was certified: {', '.join(environment['changed'])}"] if environment["changed"] else []
    more += [environment["fault"]] if "fault" in environment else []
    raise CheckFailed(f"{folder}: not what was certified: {'; '.join([', '.join(failed), *more])}")


def lines(report: dict[str, Any]) -> list[str]:
    """What a person reads."""
    environment = report["environment"]
    on = environment.get("provider")
    said = [f"on {on}, onnxruntime {environment['versions']['onnxruntime']}"] if on else []
    width = max(len(check["name"]) for check in report["checks"])
    for check in report["checks"]:
        mark = "pass" if check["pass"] else "FAIL"
        said.append(f"{check['name']:<{width}}  {_shown(check['value']):>10}  {_limit(check):<12}  {mark}")
    return [*said, report["verdict"].upper()]


def _plain(folder: Path, session: onnxruntime.InferenceSession, graph: dict[str, Any]) -> OnnxRunner:
    """The model without an adapter of its own, run as the certificate says where another program made it."""
    if not graph:
        return OnnxRunner(session, cache_shape=cache_shape(folder))
    fed = runtime.load_adapter(folder / graph["adapter"]).values() if graph["adapter"] else {}
    shape = tuple(graph["cache_shape"]) if graph["cache_shape"] else None
    return OnnxRunner(session, fixed=fed, cache_shape=shape, output=graph["output"], length=graph["length"])


def _compare(
    folder: Path, plain: OnnxRunner, cases: Sequence[Golden], limits: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    """The checks of each adapter: the worst of its golden inputs."""
    worst: dict[str, dict[str, Any]] = {}
    effect: dict[str, float] = {}
    loaded = {
        name: replace(plain, adapter=runtime.load_adapter(folder / "adapters" / f"{name}.onnx_adapter"))
        for name in {case.adapter for case in cases if case.adapter is not None and _is_branch(folder, case.adapter)}
    }
    for case, limit in zip(cases, limits, strict=True):
        name = case.adapter or "base"
        runner = loaded.get(name, plain)
        logits = _run(runner, case)
        found = case.rows(logits)
        for figure, reference in (("drift", case.certified), ("distance", case.tuned)):
            check = _check(f"{figure}@{name}", golden.divergence(reference, found), limit[figure])
            key = check["name"]
            if key not in worst or (worst[key]["pass"], -_over(worst[key])) > (check["pass"], -_over(check)):
                worst[key] = check
        if name in loaded:
            effect[name] = max(effect.get(name, 0.0), float(np.abs(logits - _run(plain, case)).max()))
    alive = [_check(f"alive@{name}", int(moved > _ALIVE), 1) for name, moved in sorted(effect.items())]
    return [*worst.values(), *alive]


def _run(runner: OnnxRunner, case: Golden) -> Any:
    return runner.decode(case.prompt, case.tokens) if len(case.tokens) else runner.prefill(case.prompt)


def _is_branch(folder: Path, adapter: str) -> bool:
    return (folder / "adapters" / f"{adapter}.onnx_adapter").is_file()


def _over(check: dict[str, Any]) -> float:
    value = float(check["value"]) if check["value"] is not None else math.inf
    return value / check["limit"] if check["limit"] else value


def _check(name: str, value: float, limit: float) -> dict[str, Any]:
    """A check; a value that is no number fails, and JSON has no NaN."""
    finite = math.isfinite(value)
    check = {"name": name, "value": value if finite else None, "limit": limit}
    held = value >= limit if _at_least(check) else value <= limit
    return {**check, "pass": bool(finite and held)}


def _at_least(check: dict[str, Any]) -> bool:
    return check["name"].partition("@")[0] in _AT_LEAST


def _limit(check: dict[str, Any]) -> str:
    return f"{'≥' if _at_least(check) else '≤'} {check['limit']:.3g}"


def _providers(asked: str | None) -> list[str]:
    available: list[str] = require("onnxruntime", "cpu").get_available_providers()
    if asked is None:
        return [name for name in available if name not in _NOT_BY_ITSELF]
    name = asked if asked.endswith("ExecutionProvider") else f"{asked}ExecutionProvider"
    known = next((one for one in available if one.lower() == name.lower()), name)
    return list(dict.fromkeys([known, "CPUExecutionProvider"]))


def _versions() -> dict[str, str]:
    ort = require("onnxruntime", "cpu")
    return {
        "diablo-export": __version__, "onnxruntime": ort.__version__, "numpy": np.__version__,
        "python": platform.python_version(), "platform": platform.platform(),
    }  # fmt: skip


def _shown(value: float | None) -> str:
    return "no number" if value is None else f"{value:.3g}"


def main(arguments: Sequence[str]) -> int:
    """Verify one folder without the command line's own packages; returns the exit code."""
    print_what_fits()
    if len(arguments) != 1:
        print("usage: python -m diablo_export.measure.verify OUT", file=sys.stderr)
        return 2
    try:
        report = verify(arguments[0])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(report)))
    try:
        require_pass(report, Path(arguments[0]))
    except CheckFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
