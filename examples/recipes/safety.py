"""Safety: LLaMA-3-8B, blocks in all seven projections. Data: pairs of requests and safe answers in the Alpaca form.

    python examples/recipes/safety.py saferpaca.json --output out/safety --tasks toxigen

Blocks and modules are the paper's; its learning rate, batch and epochs for safety are not published, and these are the
defaults of its training script. It evaluates on HEx-PHI, which is handed out on request and is no task of the harness:
no task runs unless you name one.
"""

from __future__ import annotations

from recipe import alpaca, run

run(
    __doc__, alpaca, model="meta-llama/Meta-Llama-3-8B",
    num_blocks=64, target_modules="all-linear", lr=5e-4, schedule="linear", warmup_steps=100, epochs=3,
    batch_size=4, grad_accumulation=4, max_length=512, dtype="bfloat16",
)  # fmt: skip
