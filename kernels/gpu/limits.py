"""What is wanted of the CUDA code, beside what a run of `run.py` found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FLOOR, DECODE, PROMPT = 1.3, 1.05, 1.03  # over the bandwidth's floor; over MatMulNBits alone, one row and many
# tokens a second over those of another way to train; its memory may not be exceeded either
TRAINING = (("diablo", "lora", 1.1), ("diablo", "einsum", 1.3), ("diablo int4", "qlora nf4", 1.0))


@dataclass
class Figure:
    """`value` may be at most `limit`, or with `least` must be at least that. None: it was not measured, and why."""

    name: str
    value: float | None
    limit: float
    least: bool = False
    why: str = ""

    @property
    def held(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: {self.why}"
        return f"{self.name}: {self.value:.3g}, wanted at {'least' if self.least else 'most'} {self.limit:g}"


def figures(report: dict[str, Any]) -> list[Figure]:
    """Every figure that there is a limit for; times of a processor have none."""
    parts = report["parts"]
    found = [Figure(name, None, 0, why=why) for name, part in parts.items() if (why := reason(part))]
    found += checks(parts)
    if "device" in report["machine"]:
        found += [*speed(parts.get("speed", {})), *layers(parts.get("sessions", {}))]
        found += training(parts.get("training", {}))
    return found


def reason(part: dict[str, Any]) -> str:
    """Why a part shows nothing, or not all."""
    return str(part.get("failed") or part.get("skipped") or "")


def checks(parts: dict[str, Any]) -> Iterator[Figure]:
    """Numbers, memory errors, whole models."""
    numbers = parts.get("numbers", {})
    for kind, error in numbers.get("worst", {}).items():
        where = f" ({numbers['worst_at'][kind]})" if error > 1 and kind in numbers.get("worst_at", {}) else ""
        yield Figure(f"error over what is allowed, {kind}{where}", error, 1)
    for tool in ("memcheck", "racecheck", "synccheck"):
        if tool in parts and not reason(parts[tool]):
            yield Figure(f"compute-sanitizer {tool}, errors", 0, 0)
    for name, one in parts.get("sessions", {}).get("models", {}).items():
        moved = one["adapters_move_logits_by"]  # adapters that do nothing show nothing
        yield Figure(f"{name}, how far adapters move logits", moved, 0.1, least=True)
        for run in one["runs"]:
            yield Figure(f"{name} {run['library']} kernels, largest error over logits", run["error"], run["allowed"])
            if run["library"] != "without":
                elsewhere = ", ".join(run["not_on_device"])
                yield Figure(
                    f"{name} {run['library']} kernels, nodes elsewhere {elsewhere}", len(run["not_on_device"]), 0
                )


def speed(part: dict[str, Any]) -> Iterator[Figure]:
    """The branch alone, for one row."""
    for one in part.get("branch", []):
        if one["rows"] == 1:
            yield Figure(f"branch {one['layer']}, 1 row, time over its floor", one["ratio"], FLOOR)


def layers(part: dict[str, Any]) -> Iterator[Figure]:
    """Fused int4 layers in ONNX Runtime."""
    for one in part.get("layers", []):
        name, ratio = f"int4 {one['layer']}, {one['rows']} rows", one["ratio"]
        yield Figure(f"{name}, time over MatMulNBits alone", ratio["fused"], DECODE if one["rows"] == 1 else PROMPT)
        yield Figure(f"{name}, time over MatMulNBits and LoRA", ratio["fused"] / ratio["lora"], 1)


def training(part: dict[str, Any]) -> Iterator[Figure]:
    """Steps of training."""
    kinds = part.get("kinds", {})
    for own, wanted, factor in TRAINING:
        other = "peft lora" if wanted == "lora" and "peft lora" in kinds else wanted
        if not all("tokens_per_second" in kinds.get(kind, {}) for kind in (own, other)):
            absent = ", ".join(part.get("not_installed", []))
            why = "not measured" + (f"; not installed: {absent}" if absent else "")
            if own in kinds:
                yield Figure(f"training, {own} over {other}", None, factor, why=why)
            continue
        faster = kinds[own]["tokens_per_second"] / kinds[other]["tokens_per_second"]
        yield Figure(f"training, tokens a second of {own} over {other}", faster, factor, least=True)
        memory = kinds[own]["peak_bytes"] / kinds[other]["peak_bytes"] if kinds[other]["peak_bytes"] else 0.0
        yield Figure(f"training, memory of {own} over {other}", memory, 1)


def table(found: list[Figure]) -> list[str]:
    """As lines of Markdown."""
    lines = ["| figure | value | wanted | |", "|---|---|---|---|"]
    for one in found:
        value = one.why if one.value is None else f"{one.value:.3g}"
        wanted = f"{'at least' if one.least else 'at most'} {one.limit:g}"
        lines.append(f"| {one.name} | {value} | {wanted} | {'met' if one.held else '**missed**'} |")
    return [*lines, ""]
