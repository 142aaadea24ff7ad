"""What a step of training costs beside LoRA and the paper's own layer, as JSON.

    python kernels/gpu/training.py

Decoder layers of Llama 3 8B's sizes in bfloat16, batches of 4 x 2048 tokens, AdamW. The kinds take turns: this
project's layer, also beside packed int4; LoRA of as many parameters, PEFT's too where it is installed; and the layer as
the paper has it, an einsum and a sum; and the frozen base alone. Each beside a base of its own, adapters in float32,
under autocast. With bitsandbytes installed, LoRA on nf4 as well. The floor of a step is what the base's products need
at the rate of a large one, measured here.
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
from speed import matrix_rate
from steps import attempt, in_turns
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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--num-blocks", type=int, default=64)
    asked = parser.parse_args()
    sizes, tokens, blocks = (SMALL, (2, 16), 4) if asked.small else (LLAMA, (4, 2048), asked.num_blocks)
    kinds: dict[str, Any] = {"diablo": Blocks, "einsum": Einsum, "lora": Lora, "diablo int4": Packed, "base": frozen}
    missing = [name for name in ("peft", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if "peft" not in missing:
        kinds["peft lora"] = peft_lora
        if "bitsandbytes" not in missing and asked.device == "cuda":
            kinds["qlora nf4"] = peft_qlora
    rate = matrix_rate(asked.device, 256 if asked.small else 8192)
    floor = asked.layers * operations(sizes, tokens) / rate * 1e3
    found: dict[str, Any] = {
        "tokens": tokens,
        "layers": asked.layers,
        "matrix_rate": rate,
        "floor_ms": floor,
        "kinds": {},
    }
    found["not_installed"] = missing
    clocks: dict[str, Callable[[], float]] = {}
    for kind, make in kinds.items():

        def ready(kind: str = kind, make: Any = make) -> None:
            step, found["kinds"][kind] = prepare(make, sizes, asked.layers, tokens, blocks, asked.device)
            clocks[kind] = lambda: clock(step, asked.device)

        attempt(kind, ready, found)
    for times in in_turns(clocks, asked.rounds):
        for kind, values in times.items():
            found["kinds"][kind]["ms"] = statistics.median(values) * 1e3
            found["kinds"][kind]["tokens_per_second"] = tokens[0] * tokens[1] / statistics.median(values)
        print(json.dumps(found))


def operations(sizes: dict[str, tuple[int, int]], tokens: tuple[int, int]) -> float:
    """Of a layer's step: its products, forward and for the gradient of x; and attention, two and five over half of all
    pairs.
    """
    batch, length = tokens
    pairs = batch * length * length / 2
    return 4.0 * batch * length * sum(i * o for i, o in sizes.values()) + 7 * 2 * pairs * sizes["q_proj"][1]


def frozen(base: nn.Linear, num_blocks: int) -> nn.Module:
    return base


def peft_lora(base: nn.Linear, num_blocks: int) -> nn.Module:
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    return peft_layer(Linear, base, LoraConfig, rank_of(base, num_blocks))


def peft_layer(make: Any, base: nn.Module, config: Any, rank: int) -> nn.Module:
    """PEFT's layer with an adapter in float32, as its own models have it."""
    try:
        layer: nn.Module = make(base, "default", config(r=rank, lora_alpha=16), r=rank, lora_alpha=16)
    except TypeError:  # before 0.18 the layer took no config
        layer = make(base, "default", r=rank, lora_alpha=16)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return layer


def peft_qlora(base: nn.Linear, num_blocks: int) -> nn.Module:
    from bitsandbytes.nn import Linear4bit as Packed4bit
    from bitsandbytes.nn import Params4bit
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    inputs, outputs, device = base.in_features, base.out_features, base.weight.device
    packed = Packed4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    # From bfloat16, as a model is loaded: what it is dequantized to
    packed.weight = Params4bit(base.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    return peft_layer(Linear4bit, packed.to(device), LoraConfig, rank_of(base, num_blocks))


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
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda") if trained else None
    x = torch.randn(*tokens, sizes["q_proj"][0], device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        if optimizer is not None:
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
