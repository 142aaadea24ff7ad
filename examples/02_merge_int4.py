"""Merge the blocks of 01 into int4 weights and look at the result: python examples/02_merge_int4.py MODEL"""

from __future__ import annotations

import sys

import diablo_export

(model,) = sys.argv[1:]
manifest = diablo_export.merge(model, "adapter", "int4", quantize="int4", overwrite=True)
report = diablo_export.inspect("int4")
for layer in report["linear_layers"]:
    print(f"{layer['count']} × {layer['layout']} in {layer['weights']}, groups of {layer['group_size']}")
print("modules:", report["modules_by_action"])
survival = manifest["survival"]
best = next(row for row in survival["tried"] if row["method"] == survival["method"])
print(f"{best['method']} keeps gain {best['gain']:.3f}, cosine {best['cosine']:.3f}; enough: {survival['passed']}")
