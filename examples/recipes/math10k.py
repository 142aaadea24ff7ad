"""Math10K on a 4-bit or 2-bit LLaMA-2-7B, trained beside the very weights that ship. Data: math_10k.json, Alpaca form.

    python examples/recipes/math10k.py math_10k.json --output out/math-int4
    python examples/recipes/math10k.py math_10k.json --output out/math-int2 --set base_quantize=int2

Blocks and modules are the paper's; learning rate, batch, epochs and group size are not published, and these are the
defaults of its training script and groups of 64. The paper's base is preprocessed by MagR, this one is not. The branch
keeps the blocks as trained; the merge puts them into the codes.
"""

from __future__ import annotations

from recipe import PAPER, alpaca, run

run(
    __doc__, alpaca, model="meta-llama/Llama-2-7b-hf", tasks=["gsm8k"],
    base_quantize="int4", group_size=64,
    num_blocks=64, target_modules=PAPER, lr=5e-4, schedule="linear", warmup_steps=100, epochs=3,
    batch_size=4, grad_accumulation=4, max_length=512, dtype="bfloat16",
)  # fmt: skip
