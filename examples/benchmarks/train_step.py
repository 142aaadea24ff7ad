"""What a step of training costs: DiaBlo beside PEFT's LoRA of equal parameters, and the frozen base's own passes.

    python examples/benchmarks/train_step.py [--rounds 15] [--only llama|encoder] [--threads 2]

Three copies of one random model take the same batch in turns, so that a busy machine slows all of them. The floor is
the frozen base alone: forward, and backward to its first layer's input, with nothing to train. Memory is what torch's
CPU allocator hands out from before the blocks (or LoRA) are there to the end of the second step, at its highest:
adapter, gradients, AdamW's moments, activations; the base's own weights are not in it. Needs `pip install peft`. On
two cores it takes about two minutes. Exits with 1 when a figure is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from diablo_export.trainer.folding import fold_blocks
from diablo_export.trainer.layer import diablo_layers, features
from diablo_export.trainer.targets import choose_targets, wrap_targets

LIMITS = {"time / LoRA": 0.80, "memory / LoRA": 1.00, "time / base": 1.15}
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=sorted(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--times", type=int, default=1, help="So many times as many items.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter  # the former is deaf to a busy machine
    missed = False
    for name in [options.only] if options.only else sorted(MODELS):
        figures = measure(name, options.rounds, clock, options.times)
        missed |= not all(figures["reached"].values())
        print(json.dumps(figures))
    sys.exit(missed)


def llama() -> tuple[Any, Tensor, int]:
    """A Llama of 24 M parameters, 4 × 256 tokens, 16 blocks."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2048}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return model, torch.randint(2048, (4, 256)), 16


def encoder() -> tuple[Any, Tensor, int]:
    """MiniLM's sizes, a batch of 32 sentences of 32 tokens, 12 blocks: what a run on SST-2 does."""
    sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_attention_heads=12, vocab_size=4096)
    )
    return model, torch.randint(4096, (32, 32)), 12


MODELS = {"llama": llama, "encoder": encoder}


def measure(name: str, rounds: int, clock: Callable[[], float], times: int) -> dict[str, Any]:
    """Time and memory of a step of each kind, and their ratios."""
    torch.manual_seed(0)
    model, ids, num_blocks = MODELS[name]()
    ids = ids.repeat(times, 1)
    model.requires_grad_(False).train()
    model.config.use_cache = False
    targets = choose_targets(model)
    kinds = {"base": base, "diablo": diablo, "lora": lora}
    steps, memory, sizes = {}, {}, {}
    for kind, make in kinds.items():
        own = copy.deepcopy(model)
        steps[kind], memory[kind], sizes[kind] = peak(lambda make=make, own=own: make(own, targets, num_blocks, ids))
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 2):
        for kind in sorted(kinds, key=lambda kind: (list(kinds).index(kind) + turn) % 3):
            began = clock()
            steps[kind]()
            if turn > 1:
                took[kind].append(clock() - began)

    def ratio(first: str, second: str) -> float:
        return statistics.median(a / b for a, b in zip(took[first], took[second], strict=True))

    figures = {
        "time / LoRA": ratio("diablo", "lora"),
        "memory / LoRA": memory["diablo"] / memory["lora"],
        "time / base": ratio("diablo", "base"),
        "LoRA's time / base": ratio("lora", "base"),  # its inverse is what no method can be below of LoRA's time
    }
    return {
        "model": name,
        "parameters": {kind: size for kind, size in sizes.items() if size},
        "ms": {kind: round(statistics.median(values) * 1e3, 1) for kind, values in took.items()},
        "MB": {kind: round(value / 1e6, 1) for kind, value in memory.items()},
        **{key: round(value, 3) for key, value in figures.items()},
        "reached": {key: figures[key] <= limit for key, limit in LIMITS.items()},
    }


def diablo(model: Any, targets: list[str], num_blocks: int, ids: Tensor) -> tuple[Step, int]:
    wrap_targets(model, targets, num_blocks)
    fold_blocks(diablo_layers(model).values())  # as `train` does in float32
    return trained(model, ids)


def lora(model: Any, targets: list[str], num_blocks: int, ids: Tensor) -> tuple[Step, int]:
    """Every layer's rank gives it as many parameters as the blocks would, rounded."""
    from peft import LoraConfig, get_peft_model

    sizes = {name: features(model.get_submodule(name)) for name in targets}
    ranks = {name: max(1, round(i * o / num_blocks / (i + o))) for name, (i, o) in sizes.items()}
    config = LoraConfig(target_modules=targets, rank_pattern=ranks, lora_alpha=16)
    return trained(get_peft_model(model, config), ids)


def base(model: Any, targets: list[str], num_blocks: int, ids: Tensor) -> tuple[Step, int]:
    """No adapter: gradients of activations alone, down to the first layer."""
    model.enable_input_require_grads()
    return lambda: loss(model, ids).backward(), 0  # type: ignore[no-untyped-call]


def trained(model: nn.Module, ids: Tensor) -> tuple[Step, int]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        loss(model, ids).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in parameters)


def loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    if logits.ndim == 2:
        return functional.cross_entropy(logits, ids[:, 0] % 2)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def peak(make: Callable[[], tuple[Step, int]]) -> tuple[Step, int, int]:
    """What `make` gives, and the most bytes at once that it and two steps took, of torch's own count."""
    made: list[tuple[Step, int]] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made.append(make())
        for _ in range(2):
            made[0][0]()
    held = most = 0
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return made[0][0], most, made[0][1]


if __name__ == "__main__":
    main()
