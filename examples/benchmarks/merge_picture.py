"""What each method of merging keeps of each module: a table, and a picture of module by method.

    python examples/benchmarks/merge_picture.py --model M --adapter A --picture kept.png [--calibration DATA]

Every method merges the same adapter into the same float model, as the command `merge` does it with that --method.
Gain, cosine and KL are those of its manifest, on text that is not fitted to: against the base quantized in the same
way with the float branch beside it. With --calibration the table has loss or accuracy, too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from diablo_export import merge
from diablo_export.measure.survival_picture import check_file, draw

METHODS = ("auto", "distilled", "k_quant", "hqq", "gptq")  # auto measures rtn, refit and calibrated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--method", action="append")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    check_file(options.picture)
    rows: dict[str, dict[str, Any]] = {}
    print("| method | gain | cosine | KL | KL to float tuned | task | codes changed | s |")
    print("|---|---|---|---|---|---|---|---|")
    for method in options.method or METHODS:
        for row in merged(method, options):
            if row["method"] not in rows:
                rows[row["method"]] = row
                print(said(row), flush=True)
    draw(list(rows.values()), options.picture, f"{options.adapter.name} merged into int4 by each method")


def merged(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the manifest of one merge."""
    with tempfile.TemporaryDirectory() as scratch:
        manifest = merge(
            options.model, options.adapter, Path(scratch) / "out", quantize="int4", method=method,
            calibration=options.calibration, group_size=options.group_size,
        )  # fmt: skip
    found: list[dict[str, Any]] = manifest["survival"]["tried"]
    return found


def said(row: dict[str, Any]) -> str:
    """A row of the table."""
    known = next((name for name in ("loss", "accuracy") if name in row), None)
    task = "–" if known is None else f"{known} {row[known]:.4f} (branch {row[f'branch_{known}']:.4f})"
    tuned = f"{row['tuned_kl']:.4f}" if "tuned_kl" in row else "–"
    return (
        f"| {row['method']} | {row['gain']:.3f} | {row['cosine']:.4f} | {row['kl']:.4f} | {tuned} | {task} "
        f"| {row['codes_changed']:.1%} | {row['seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
