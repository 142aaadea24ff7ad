"""Time and memory to make an int4 ONNX model, and to merge an adapter into it when it is there, in turns.

    python examples/benchmarks/onnx_speed.py [--rounds 2] [--work DIR] [--quantize int4]

Made by this package and by onnxruntime-genai's own builder; merged is an adapter of 64 random blocks a layer (rtn).
The model is a random Qwen2.5-0.5B (real sizes, bf16, three shards, made on the spot, 1 GB); needs 4 GB of free disk.
Each build is a process of its own: interpreter start and imports count, as they do for whoever types the command. Peak
is the largest resident memory of that process. On a busy machine compare the processor times. diablo-export keeps the
embedding in the checkpoint's 16 bits, the builder rounds a tied one to int4 with the head: hence its smaller output.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BUILD = """
import sys
from pathlib import Path
from typing import Any
from diablo_export.converters.onnx_graph import build_graph
build_graph(sys.argv[1], Path(sys.argv[2]), quantize=sys.argv[3])
"""
MERGE = "from diablo_export.cli import main; main()"


def make_model(folder: Path) -> None:
    """A random Qwen2.5-0.5B, and an adapter beside it."""
    from transformers import Qwen2Config

    save_random(Qwen2Config(**SIZES), folder)
    save_adapter(folder, folder.with_name("adapter"), 64, 0.004)


def save_adapter(model: Path, folder: Path, num_blocks: int, scale: float) -> None:
    """Random blocks for every linear layer of a model's decoder layers."""
    import numpy as np

    from diablo_export.adapter import AdaptedModule, Adapter
    from diablo_export.blockdiag import BlockShape
    from diablo_export.checkpoint import Checkpoint
    from diablo_export.fingerprint import fingerprint

    random = np.random.default_rng(0)
    modules = {}
    for info in Checkpoint.open(model):
        if len(info.shape) == 2 and ".layers." in info.name:
            name, weight = info.name.removesuffix(".weight"), info.read()
            shape = BlockShape.for_linear(weight.shape[1], weight.shape[0], num_blocks)
            blocks = random.normal(0, scale, shape.blocks).astype(np.float32)
            modules[name] = AdaptedModule(name, blocks, weight.shape[1], weight.shape[0], fingerprint(weight))
    folder.mkdir(parents=True, exist_ok=True)
    Adapter(modules, base_model=str(model), num_blocks=num_blocks).save(folder)


def save_random(config: Any, folder: Path) -> None:
    """A random model in bf16 and shards, with a small tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400MB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a few words"], trainer)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of processor time, and peak resident megabytes of one process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said.decode()}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def report(name: str, output: Path, seconds: float, processor: float, peak: float) -> float:
    """Print a line; returns the processor time."""
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    figures = f"{seconds:6.1f} s ({processor:5.1f} s of processor time), peak {peak:6.0f} MB"
    print(f"{name}: {figures}, output {size:6.0f} MB", flush=True)
    return processor


def main() -> None:
    """Build in turns and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quantize", choices=["none", "int8", "int4"], default="int4")
    parser.add_argument("--work", type=Path, help="keep the model here, to be used again")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="onnx_speed-"))
    model, output, merged = work / "model", work / "output", work / "merged"
    if not (work / "adapter").exists():
        subprocess.run([sys.executable, __file__, "--make", str(model)], check=True)
    precision = {"none": "fp32"}.get(options.quantize, options.quantize)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(output)]
    builder += ["-p", precision, "-e", "cpu", "-c", str(work / "cache")]
    ours = [sys.executable, "-c", BUILD, str(model), str(output), options.quantize]
    merge = [sys.executable, "-c", MERGE, "merge", "--model", str(output), "--adapter", str(work / "adapter")]
    merge += ["--output", str(merged), "--overwrite", "--quiet"]
    merge += [] if options.quantize == "none" else ["--method", "rtn"]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {options.quantize}")
    try:
        for _ in range(options.rounds):
            for name, command in (("diablo-export", ours), ("genai builder", builder)):
                shutil.rmtree(output, ignore_errors=True)
                output.mkdir(parents=True)
                made = report(name, output, *measure(command))
                spent = report(f"merge into that of {name}", merged, *measure(merge))
                print(f"    merging costs {spent / made:.1%} of making", flush=True)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(merged, ignore_errors=True)
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_model(Path(sys.argv[2]))
    else:
        main()
