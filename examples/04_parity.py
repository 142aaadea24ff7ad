"""Prove that the branch of 03 is what 01 trained: python examples/04_parity.py test.jsonl"""

from __future__ import annotations

import sys

import diablo_export

(data,) = sys.argv[1:]
report = diablo_export.parity("branch", data=data, samples=4, steps=4, junit="parity.xml")
for check in report["checks"]:
    print(
        f"{'pass' if check['pass'] else 'FAIL'}  {check['name']:32} {check['value']:.3g} (limit {check['limit']:.3g})"
    )
print("verdict:", report["verdict"])
sys.exit(report["verdict"] != "pass")
