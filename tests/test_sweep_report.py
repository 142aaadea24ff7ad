"""A sweep as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo_export.trainer.sweep_report import draw, lines, table


def made(method: str, losses: dict[float, list[float | None]], **more: Any) -> list[dict[str, Any]]:
    return [
        {"method": method, "lr": lr, "num_blocks": 8, "target_modules": None, "seed": seed, "parameters": 100, **more}
        | ({"diverged": "NaN"} if loss is None else {"eval_loss": loss, "step_seconds": 0.01})
        for lr, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_table_tells_the_best_rate_and_how_flat_it_is(tmp_path: Path) -> None:
    results = [{"method": "base", "lr": None, "num_blocks": None, "target_modules": None, "seed": 0, "eval_loss": 5.0}]
    results += made(
        "diablo", {1e-4: [4.0, 4.2], 1e-3: [3.01, 3.01], 1e-2: [3.0, 3.002], 1e-1: [3.5, 3.5], 1: [2, None]}
    )
    results += made("lora", {1e-3: [3.5, 3.7], 1e-2: [None, None]}, rank=5)
    results += made("smt", {1e-3: [None, None]})
    found = {line.name: line for line in lines(results)}
    assert found["DiaBlo N = 8"].flat() == [1e-3, 1e-2] and found["DiaBlo N = 8"].best == 1e-2
    assert found["LoRA r = 5"].flat() == [1e-3] and found["SMT N = 8"].best is None
    assert table(results).splitlines()[2:] == [
        "| base | 0 | – | 5.0000 | – | – | – |",
        "| DiaBlo N = 8 | 100 | 0.01 | 3.0010 | 3.0000 – 3.0020 | 0.001 – 0.01 (×10) | 10 ms |",
        "| LoRA r = 5 | 100 | 0.001 | 3.6000 | 3.5000 – 3.7000 | 0.001 alone | 10 ms |",
        "| SMT N = 8 | 100 | – | diverged | – | – | – |",
        "",
        "The best of the learning rates lies at their edge, and may lie beyond it: LoRA r = 5.",
    ]
    # nothing is told of a single rate, nor of a best one between others that is next to one that diverged
    assert "edge" not in table(made("diablo", {1e-3: [3.0]}) + made("lora", {1e-3: [4], 1e-2: [3], 1e-1: [None]}))
    draw(results, tmp_path / "sweep.png", "made up")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_targets_that_are_regular_expressions_are_shown_as_they_are(tmp_path: Path) -> None:
    sets = [[r".*(q|v)_proj$", r".*\.up_proj$"], ["q_proj"]]
    results = [row | {"target_modules": names} for names in sets for row in made("diablo", {1e-3: [3.0]})]
    rows = table(results).splitlines()
    assert rows[2].startswith(r"| DiaBlo N = 8, .*(q\|v)_proj$+.*\.up_proj$ | 100 |")  # else a cell more
    draw(results, tmp_path / "sweep.png", "model on $a_$.jsonl")


def test_a_gap_ends_the_flat_range() -> None:
    results = made("diablo", {1e-4: [3.0], 1e-3: [3.5], 1e-2: [3.0], 1e-1: [3.01]})
    assert lines(results)[0].flat() in ([1e-2, 1e-1], [1e-4])
