"""Exports as other programs make them, for the tests of parity: PEFT adapters, builder, torch."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

# LoRA options for the tiny BERT
CLASSIFIER: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]}


def make_peft(model: Path, folder: Path, seed: int = 1, **options: Any) -> Path:
    """Save a LoRA adapter with random weights for a model; `options` are of LoraConfig."""
    import peft
    import torch

    torch.manual_seed(seed)
    base = load(model)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    network = peft.get_peft_model(base, peft.LoraConfig(**{**chosen, **options}))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:  # PEFT begins with zeros
                parameter.normal_(0, 0.1)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return folder


def load(model: Path) -> Any:
    """A folder's model, a classifier where it says that it is one."""
    import transformers

    (kind,) = transformers.AutoConfig.from_pretrained(model).architectures
    return getattr(transformers, kind).from_pretrained(model)


def merge_peft(model: Path, adapter: Path, folder: Path) -> Path:
    """What `merge_and_unload` makes, with the base's tokenizer."""
    import peft
    import transformers

    peft.PeftModel.from_pretrained(load(model), adapter).merge_and_unload().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def build(model: Path, folder: Path, precision: str = "fp32", *options: str, provider: str = "cpu") -> Path:
    """Run onnxruntime-genai's builder with extra options, as its users do; returns the folder."""
    from onnxruntime_genai.models import builder

    arguments = (None, str(model), str(folder), precision, provider, str(folder / "cache"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, list(options)))
    logging.getLogger().setLevel(logging.WARNING)
    return folder


def export_with_torch(model: Path, file: Path, length: int | None = None, adapter: Path | None = None) -> Path:
    """`torch.onnx.export(dynamo=True)` of a folder's model: ids in, logits out; fixed to `length` tokens, or free.

    With an adapter of PEFT's beside its weights, where there is one.
    """
    import peft
    import torch

    network = load(model).eval()
    network.config.use_cache = False
    if adapter is not None:
        network = peft.PeftModel.from_pretrained(network, adapter).eval()

    class Logits(torch.nn.Module):
        def forward(self, input_ids: Any) -> Any:
            return network(input_ids=input_ids).logits

    file.parent.mkdir(parents=True, exist_ok=True)
    ids = torch.arange(3, 3 + (length or 12))[None]
    shapes = None if length else {"input_ids": {1: torch.export.Dim("tokens", min=2, max=256)}}
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(Logits(), (ids,), str(file), dynamo=True, dynamic_shapes=shapes, verbose=False)
    return file


def judge(out: Path, model: Path, adapter: Path, **options: Any) -> dict[str, Any]:
    """A short parity of an export with this adapter."""
    from diablo_export.measure.parity import parity
    from tests.exports import SMALL

    return parity(out, model=model, adapter=[str(adapter)], **{**SMALL, **options})


def put_into_a_file(graph: Path, file: Path) -> dict[str, Any]:
    """LoRA's matrices become inputs of the graph, their values an .onnx_adapter, as Olive makes them."""
    import onnx

    from diablo_export.converters.onnx_adapters import write_onnx_adapter

    whole = onnx.load(graph)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in whole.graph.initializer if "lora" in t.name}
    kept = [tensor for tensor in whole.graph.initializer if tensor.name not in values]
    del whole.graph.initializer[:]
    whole.graph.initializer.extend(kept)
    for name, value in values.items():
        whole.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape))
    onnx.save(whole, graph)
    write_onnx_adapter(file, values)
    return values
