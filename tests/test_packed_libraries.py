"""Merged quantized checkpoints, read by the libraries whose formats they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from diablo_export.adapter import Adapter
from diablo_export.converters.hf_merge import hf_merge
from tests import packed

Get = Callable[[str], Path]
LIBRARIES = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors",
}  # fmt: skip
LOADED = ["gptq", "gptq-act-order", "gptq-asym", "awq", "compressed-tensors", "compressed-tensors-8-bits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_their_own_libraries_load_what_was_merged(
    name: str, quantized: Get, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    pytest.importorskip(LIBRARIES[packed.FORMATS[name][0]["quant_method"]])
    import torch
    from transformers import AutoModelForCausalLM

    adapter = Adapter.load(tiny_adapter("llama"))
    hf_merge(quantized(name), adapter, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    for module in adapter.modules:
        reference.get_submodule(module).weight.data = torch.from_numpy(packed.stored(tmp_path, name, module))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = reference(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(quantized(name), dtype=torch.float32)(ids).logits
    # gptqmodel's kernels for a CPU compute in bfloat16 inside, the others in float32
    tolerance = 0.05 if name.startswith(("gptq", "awq")) else 1e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert (found - base).abs().max() > 1


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_bitsandbytes_own_reader(name: str, quantized: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    import torch
    from transformers import AutoModelForCausalLM

    adapter = Adapter.load(tiny_adapter("llama"))
    hf_merge(quantized(name), adapter, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for module in adapter.modules:
        weight = model.get_submodule(module).weight
        shape, state = weight.quant_state.shape, weight.quant_state
        # Flat: on a CPU bitsandbytes 0.50 misreads rows that end within a group, also of what it quantized itself.
        state.shape = torch.Size([shape.numel()])
        found = functional.dequantize_4bit(weight.data, state).reshape(shape).numpy()
        # the same products of float32, fused with the sum of double quantization or not
        np.testing.assert_allclose(found, packed.stored(tmp_path, name, module), rtol=2**-22, atol=0)


def test_compressed_tensors_own_reader_of_zero_points(quantized: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """transformers 5.23 loads no checkpoint with packed zero points; the library itself unpacks them."""
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    import torch

    name = "compressed-tensors-asym"
    hf_merge(quantized(name), Adapter.load(tiny_adapter("llama")), tmp_path)
    group = packed.FORMATS[name][0]["config_groups"]["group_0"]
    scheme = schemes.QuantizationScheme(targets=group["targets"], weights=group["weights"])
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        tensors = packed.parts(load_file(tmp_path / "model.safetensors"), module)
        state = {key: torch.from_numpy(value) for key, value in tensors.items()}
        found = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"].float().numpy()
        # it multiplies in the scales' float16
        np.testing.assert_allclose(found, packed.stored(tmp_path, name, module), rtol=2**-10, atol=0)
