"""Code generation, evaluated on HumanEval: LLaMA-3-8B, blocks in all seven projections. Data: CodeAlpaca, Alpaca form.

    HF_ALLOW_CODE_EVAL=1 python examples/recipes/code_generation.py code_alpaca_20k.json --output out/code

The harness runs what the model writes: do that in a container. Blocks and modules are the paper's. Its learning rate,
batch and epochs for code are not published; these are the defaults of its training script.
"""

from __future__ import annotations

from recipe import alpaca, run

run(
    __doc__, alpaca, model="meta-llama/Meta-Llama-3-8B", tasks=["humaneval"], unsafe_code=True,
    num_blocks=64, target_modules="all-linear", lr=5e-4, schedule="linear", warmup_steps=100, epochs=3,
    batch_size=4, grad_accumulation=4, max_length=512, dtype="bfloat16",
)  # fmt: skip
