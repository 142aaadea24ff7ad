"""What a step of training costs beside LoRA and the paper's own layer, as JSON.

    python kernels/gpu/training.py

Decoder layers of Llama 3 8B's sizes in bfloat16, batches of 4 x 2048 tokens, AdamW. The kinds take turns: this
project's layer, also beside packed int4; LoRA of as many parameters, PEFT's too where it is installed; and the layer as
the paper has it, an einsum and a sum. Each beside a base of its own, adapters in float32, under autocast. With
bitsandbytes installed, LoRA on nf4 as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diablo_export.trainer import joined

LLAMA = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096),
         "gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}  # fmt: skip
SMALL = {name: (i // 64, o // 64) for name, (i, o) in LLAMA.items()}


class Blocks(nn.Module):
    """This project's layer, as `DiabloLinear` computes it on CUDA."""

    def __init__(self, base: nn.Linear, num_blocks: int) -> None:
        super().__init__()
        self.base = base
        shape = (num_blocks, base.in_features // num_blocks, base.out_features // num_blocks)
        self.blocks = nn.Parameter(torch.zeros(shape, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return joined.linear(x, self.base.weight, None, self.blocks)


class Einsum(Blocks):
    """y = base(x) + einsum of x by blocks: two outputs and their sum."""

    def forward(self, x: Tensor) -> Tensor:
        count, size_in, _ = self.blocks.shape
        apart = torch.einsum("btni,nio->btno", x.unflatten(-1, (count, size_in)), self.blocks.to(x.dtype))
        y: Tensor = self.base(x)
        return y + apart.flatten(-2)


class Lora(nn.Module):
    """LoRA without PEFT, of as many parameters as the blocks have."""

    def __init__(self, base: nn.Linear, num_blocks: int) -> None:
        super().__init__()
        self.base, device = base, base.weight.device
        rank = rank_of(base, num_blocks)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, device=device) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + x @ self.down.to(x.dtype).T @ self.up.to(x.dtype).T


class Packed(nn.Module):
    """The blocks beside int4 codes, dequantized for each product."""

    def __init__(self, base: nn.Linear, num_blocks: int) -> None:
        super().__init__()
        shape = (num_blocks, base.in_features // num_blocks, base.out_features // num_blocks)
        groups, device = base.in_features // 32, base.weight.device
        self.blocks = nn.Parameter(torch.zeros(shape, device=device))
        codes = torch.randint(0, 256, (base.out_features, groups, 16), dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.rand(base.out_features, groups, device=device) / 500)

    def forward(self, x: Tensor) -> Tensor:
        return joined.packed_linear(x, self.codes, self.scales, None, None, self.blocks, 4)


def rank_of(base: nn.Linear, num_blocks: int) -> int:
    i, o = base.in_features, base.out_features
    return max(1, round(i * o / num_blocks / (i + o)))


class Layer(nn.Module):
    """The linear layers of one decoder layer and what is between them, attention over the tokens included."""

    def __init__(self, make: Callable[[str], nn.Module], heads: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: make(name) for name in LLAMA})
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        parts, normed = self.parts, nn.functional.rms_norm(x, x.shape[-1:])
        q, k, v = (parts[f"{name}_proj"](normed).unflatten(-1, (-1, x.shape[-1] // self.heads)) for name in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        x = x + parts["o_proj"](mixed.transpose(1, 2).flatten(-2))
        normed = nn.functional.rms_norm(x, x.shape[-1:])
        gated = nn.functional.silu(parts["gate_proj"](normed)) * parts["up_proj"](normed)
        return x + parts["down_proj"](gated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="to try the script itself")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-blocks", type=int, default=64)
    asked = parser.parse_args()
    sizes, tokens, blocks = (SMALL, (2, 16), 4) if asked.small else (LLAMA, (4, 2048), asked.num_blocks)
    kinds: dict[str, Any] = {"diablo": Blocks, "einsum": Einsum, "lora": Lora, "diablo int4": Packed}
    missing = [name for name in ("peft", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if "peft" not in missing:
        kinds["peft lora"] = peft_lora
        if "bitsandbytes" not in missing and asked.device == "cuda":
            kinds["qlora nf4"] = peft_qlora
    found, steps = {}, {}
    for kind, make in kinds.items():
        steps[kind], found[kind] = prepare(make, sizes, asked.layers, tokens, blocks, asked.device)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(asked.rounds):
        for kind in list(kinds)[turn % len(kinds) :] + list(kinds)[: turn % len(kinds)]:
            times[kind].append(clock(steps[kind], asked.device))
    for kind, values in times.items():
        found[kind]["ms"] = statistics.median(values) * 1e3
        found[kind]["tokens_per_second"] = tokens[0] * tokens[1] / statistics.median(values)
    print(json.dumps({"tokens": tokens, "layers": asked.layers, "kinds": found, "not_installed": missing}))


def peft_lora(base: nn.Linear, num_blocks: int) -> nn.Module:
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    rank = rank_of(base, num_blocks)
    try:
        return Linear(base, "default", LoraConfig(r=rank, lora_alpha=16), r=rank, lora_alpha=16)
    except TypeError:  # before 0.18 the layer took no config
        return Linear(base, "default", r=rank, lora_alpha=16)


def peft_qlora(base: nn.Linear, num_blocks: int) -> nn.Module:
    import bitsandbytes
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    packed = bitsandbytes.nn.Linear4bit(
        base.in_features, base.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    packed.load_state_dict({"weight": base.weight.detach().cpu()})
    rank = rank_of(base, num_blocks)
    return Linear4bit(
        packed.to(base.weight.device), "default", LoraConfig(r=rank, lora_alpha=16), r=rank, lora_alpha=16
    )


def prepare(
    make: Any, sizes: dict[str, tuple[int, int]], layers: int, tokens: tuple[int, int], num_blocks: int, device: str
) -> tuple[Callable[[], None], dict[str, float]]:
    """A step of training, and the most memory that it took from nothing, the model included."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0

    def part(name: str) -> nn.Module:
        base = nn.Linear(*sizes[name], bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
        module: nn.Module = make(base, num_blocks)
        return module

    model = nn.Sequential(*(Layer(part, 32 if sizes is LLAMA else 4) for _ in range(layers)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
    x = torch.randn(*tokens, sizes["q_proj"][0], device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    step()
    most = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    return step, {"parameters": sum(p.numel() for p in trained), "peak_bytes": most}


def clock(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
