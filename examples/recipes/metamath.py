"""MetaMathQA, evaluated on GSM8K and MATH: the paper's script, for LLaMA-2-7B. Data: {"query", "response"}.

    python examples/recipes/metamath.py MetaMathQA-395K.json --output out/metamath --set num_blocks=32

The script has 64 blocks, the paper's best row 32.
"""

from __future__ import annotations

from recipe import PAPER, run


def example(item: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"Question: {item['query']}\nAnswer:", "completion": f" {item['response']}"}


run(
    __doc__, example, model="meta-llama/Llama-2-7b-hf", tasks=["gsm8k", "hendrycks_math"],
    num_blocks=64, target_modules=PAPER, lr=12e-4, schedule="cosine", warmup_steps=100, epochs=1,
    batch_size=4, grad_accumulation=8, max_length=2048, dtype="bfloat16", gradient_checkpointing=True,
)  # fmt: skip
