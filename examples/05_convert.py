"""The adapter of 01 as the paper's adapter.chkpt, and back: python examples/05_convert.py MODEL"""

from __future__ import annotations

import sys

import diablo_export

(model,) = sys.argv[1:]
diablo_export.convert("adapter", model, "adapter.chkpt", overwrite=True)
again = diablo_export.convert("adapter.chkpt", model, "adapter-again", overwrite=True)
print(f"{len(again.modules)} modules, num_blocks {again.num_blocks}, targets {', '.join(again.target_modules)}")
