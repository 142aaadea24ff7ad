"""Commonsense reasoning, eight tasks: the paper's script, for LLaMA-2-7B. Data: commonsense_170k.json, Alpaca form.

    python examples/recipes/commonsense.py commonsense_170k.json --output out/commonsense --set num_blocks=128

The script has 64 blocks, the paper's best row for this model 128. The paper lets the model write its answer; the
harness compares the likelihoods of the choices, so its figures are not the paper's.
"""

from __future__ import annotations

from recipe import PAPER, alpaca, run

run(
    __doc__, alpaca, model="meta-llama/Llama-2-7b-hf",
    tasks=["boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
    num_blocks=64, target_modules=PAPER, lr=2.5e-4, schedule="linear", warmup_steps=100, epochs=3,
    batch_size=4, grad_accumulation=4, max_length=256, dtype="bfloat16",
)  # fmt: skip
