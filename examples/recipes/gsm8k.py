"""GSM8K: the paper's script, for LLaMA-2-7B. Data: GSM8K's train.jsonl, {"question", "answer"}.

    python examples/recipes/gsm8k.py train.jsonl --output out/gsm8k

Prompts are those of the harness's task, which takes what follows #### as the answer.
"""

from __future__ import annotations

from recipe import PAPER, run


def example(item: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"Question: {item['question']}\nAnswer:", "completion": f" {item['answer']}"}


run(
    __doc__, example, model="meta-llama/Llama-2-7b-hf", tasks=["gsm8k"],
    num_blocks=64, target_modules=PAPER, lr=5e-4, schedule="linear", warmup_steps=100, epochs=3,
    batch_size=4, grad_accumulation=4, max_length=256, dtype="bfloat16",
)  # fmt: skip
