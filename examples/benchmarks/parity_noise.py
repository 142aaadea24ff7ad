"""How far sound exports are from the tuned model: the noise that parity's default limits are set above.

    python examples/benchmarks/parity_noise.py --data-dir DATA [--adapter ADAPTER …] [--work DIR]

TinyStories-656K with each adapter (without one: random blocks of three strengths, made on the spot) is merged and
exported in every precision, and goes through `parity` on this project's own pages. Of every figure that has a default
limit the worst that was seen is printed beside that limit, by kind of export. Exits with 1 where one is past its limit,
which is then no noise, or a limit that is too tight. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from whole_model import make_adapter

import diablo_export
from diablo_export.adapter import Adapter

# kind → (verb, options)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32 merge": ("merge", {"format": "onnx"}),
    "fp32 branch": ("export", {}),
    "fp16 branch": ("export", {"precision": "fp16"}),
    "int8 branch": ("export", {"quantize": "int8"}),
    "int4 merge": ("merge", {"quantize": "int4", "method": "rtn"}),
    "int4 branch": ("export", {"quantize": "int4"}),
    "int8 blocks": ("export", {"block_dtype": "int8"}),
}
STRENGTHS = (1.0, 2.0, 4.0)
# no noise in these
COUNTS = ("files", "sources", "runs", "untouched", "modules.faulty", "adapter.alive", "adapter.bound")


def adapters(model: Path, work: Path) -> list[Path]:
    """Random blocks of three strengths."""
    first = work / "adapter-1.0"
    if not first.exists():
        make_adapter(model, first, 8)
    for strength in STRENGTHS:
        loaded = Adapter.load(first)
        for module in loaded.modules.values():
            module.blocks[...] *= np.float32(strength)
        (work / f"adapter-{strength}").mkdir(exist_ok=True)
        loaded.save(work / f"adapter-{strength}")
    return [work / f"adapter-{strength}" for strength in STRENGTHS]


def worst(found: dict[str, tuple[float, float, str]], report: dict[str, Any]) -> bool:
    """Put the figures that come nearest to their limits into `found`; whether all of them held."""
    from diablo_export.measure.report import explained

    for check in report["checks"]:
        name, value, limit = check["name"], float(check["value"]), float(check["limit"])
        sign = explained(check)[0]
        before = found.get(name)
        if name not in COUNTS and (before is None or (value > before[0]) == (sign == "≤")):
            found[name] = value, limit, sign
    return all(check["pass"] for check in report["checks"])


def main() -> None:
    """Measure, and print a row for each figure of each kind of export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIABLO_EXPORT_TEST_DATA"))
    parser.add_argument("--adapter", type=Path, action="append", help="trained for TinyStories-656K; can be repeated")
    parser.add_argument("--only", choices=list(KINDS), action="append", help="this kind alone; can be repeated")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--work", type=Path, help="keep what is made here")
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("give --data-dir, or set DIABLO_EXPORT_TEST_DATA")
    work = options.work or Path(tempfile.mkdtemp(prefix="parity_noise-"))
    work.mkdir(parents=True, exist_ok=True)
    model = Path(options.data_dir) / "tinystories656k-hf"
    text, held = work / "text.txt", True
    text.write_text("\n\n".join(file.read_text() for file in sorted(Path(__file__).parents[2].glob("docs/*.md"))))
    print("| export | figure | worst measured | default limit |\n|---|---|---|---|")
    try:
        given = options.adapter or adapters(model, work)
        for kind in options.only or KINDS:
            verb, more = KINDS[kind]
            found: dict[str, tuple[float, float, str]] = {}
            for adapter in given:
                out = work / "out"
                getattr(diablo_export, verb)(model, adapter, out, overwrite=True, **more)
                report = diablo_export.parity(out, data=text, max_tokens=options.max_tokens, modules=False)
                held &= worst(found, report)
            for name, (value, limit, sign) in found.items():
                print(f"| {kind} | `{name}` | {value:.3g} | {sign} {limit:.3g} |", flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    sys.exit(not held)


if __name__ == "__main__":
    main()
