"""Quantize a float model to int4 with another tool, in the environment that it is installed in; float_road.py calls it.

    python examples/benchmarks/other_quantizers.py autoround|gptqmodel MODEL TEXT OUTPUT [--group-size 32]

MODEL is a Hugging Face folder, TEXT a JSON Lines file of {"text": …}; OUTPUT becomes a checkpoint in GPTQ's format,
symmetric, the output head left in float. Both tools get the whole text and otherwise their own defaults.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

LENGTH = 128  # tokens of a sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=["autoround", "gptqmodel"])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=200, help="Of AutoRound for each layer.")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = "\n".join(json.loads(line)["text"] for line in options.text.read_text(encoding="utf-8").splitlines())
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, LENGTH)]
    if options.tool == "autoround":
        autoround(options.model, tokenizer, rows, options.output, options.group_size, options.iterations)
    else:
        gptqmodel(options.model, tokenizer, rows, options.output, options.group_size)


def autoround(model: Path, tokenizer: Any, rows: list[torch.Tensor], output: Path, size: int, iterations: int) -> None:
    """SignRound: rounding and clipping learned block by block against the float block's outputs."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    AutoRound(
        network, tokenizer, bits=4, group_size=size, sym=True, dataset=data, nsamples=len(data), seqlen=LENGTH,
        iters=iterations, device_map="cpu", enable_torch_compile=False,
    ).quantize_and_save(str(output), format="auto_gptq")  # fmt: skip


def gptqmodel(model: Path, tokenizer: Any, rows: list[torch.Tensor], output: Path, size: int) -> None:
    """GPTQ: columns rounded one after the other, the error of each pushed into those that follow."""
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(
        str(model), QuantizeConfig(bits=4, group_size=size, sym=True, offload_to_disk=False), device="cpu"
    )
    loaded.quantize(
        [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows], tokenizer=tokenizer
    )
    loaded.save(str(output))


if __name__ == "__main__":
    main()
