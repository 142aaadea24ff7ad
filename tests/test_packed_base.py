"""Quantized Hugging Face checkpoints as bases: loaded packed, trained beside as they are, merged into, measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from diablo_export.adapter import Adapter
from diablo_export.blockdiag import add_to_weight
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.converters.packed_view import float_view
from diablo_export.errors import AdapterError, CheckpointError, ExportError, InputError
from diablo_export.measure.parity import parity
from diablo_export.packed.grid import PackedGrid
from diablo_export.packed.modules import all_stored, stored
from diablo_export.trainer.history import History
from diablo_export.trainer.layer import diablo_layers
from diablo_export.trainer.model import load_base, load_tuned
from diablo_export.trainer.packed_layer import LookedUpLinear, QuantizedLinear, from_stored
from diablo_export.trainer.sweep import sweep
from diablo_export.trainer.targets import choose_targets, wrap_targets
from diablo_export.trainer.train import train
from tests import packed
from tests.onnx_runs import IDS as RUNNER_IDS
from tests.onnx_runs import LOGITS, runner
from tests.test_quantized import exact

Get = Callable[[str], Path]
RUN: dict[str, Any] = {"num_blocks": 4, "lr": 0.02, "max_steps": 4, "batch_size": 2, "max_length": 16, "seed": 3}
IDS = torch.tensor([[1, 5, 9, 30, 7, 44, 12, 3]])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text(json.dumps({"text": "the cat sat on the mat and the dog on the log. " * 12}))
    return file


def as_floats(base: Path, name: str, folder: Path) -> Path:
    """The float checkpoint of the values that a quantized one stands for, by the reader of tests/packed.py."""
    tensors = load_file(base / "model.safetensors")
    modules = [one.name for one in all_stored(Checkpoint.open(base))]
    floats = {key: value for key, value in tensors.items() if not any(key.startswith(f"{m}.") for m in modules)}
    for module in modules:
        floats[f"{module}.weight"] = np.ascontiguousarray(packed.stored(base, name, module))
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(floats, folder / "model.safetensors", {"format": "pt"})
    plain = json.loads((base / "config.json").read_text())
    del plain["quantization_config"]
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


@pytest.mark.parametrize("name", packed.FORMATS)
def test_a_base_is_loaded_packed_and_computes_what_its_floats_do(name: str, quantized: Get, tmp_path: Path) -> None:
    base = quantized(name)
    network, tokenizer = load_base(base, "causal-lm")
    floats, _ = load_base(as_floats(base, name, tmp_path / "floats"), "causal-lm")
    layers = {path: m for path, m in network.named_modules() if isinstance(m, QuantizedLinear | LookedUpLinear)}
    assert len(layers) == 14 and tokenizer.pad_token_id == 0
    assert network.name_or_path == str(base)
    for path, layer in layers.items():
        wanted = floats.get_parameter(f"{path}.weight")
        assert torch.equal(layer.weight, wanted), path
    assert torch.equal(network(IDS).logits, floats(IDS).logits)
    held = sum(tensor.nbytes for layer in layers.values() for tensor in layer.buffers())
    left = [p for path, p in network.named_parameters() if "_proj" in path]
    tensors = load_file(base / "model.safetensors")
    on_disk = sum(value.nbytes for key, value in tensors.items() if "_proj" in key)
    # beside what is stored: a zero point takes a byte of its own, a looked up layer has 2 kB of its table's pairs
    zeros = sum(layer.scales.numel() for layer in layers.values() if isinstance(layer, QuantizedLinear))
    assert not left and held <= on_disk + zeros + 2048 * len(layers)


@pytest.mark.parametrize("name", ["gptq-act-order", "gptq-8-bits", "awq", "compressed-tensors-asym", "nf4-double"])
def test_gradients_are_those_of_the_float_base(name: str, quantized: Get, tmp_path: Path) -> None:
    base = quantized(name)
    found = []
    for folder in (base, as_floats(base, name, tmp_path / "floats")):
        network, _ = load_base(folder, "causal-lm")
        wrap_targets(network, choose_targets(network, "all-linear"), 4)
        for number, layer in enumerate(diablo_layers(network).values()):
            generator = torch.Generator().manual_seed(number)
            layer.blocks.data = 0.02 * torch.randn(layer.blocks.shape, generator=generator)
        network(IDS, labels=IDS).loss.backward()
        found.append({path: layer.blocks.grad for path, layer in diablo_layers(network).items()})
    assert len(found[0]) == 14
    for path, gradient in found[0].items():
        # the same products of the same numbers; only how a product with Wᵀ is cut up may differ
        wanted = found[1][path]
        assert gradient is not None and wanted is not None
        assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-7), path


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_odd_sizes_and_groups_of_unequal_length(bits: int) -> None:
    """Groups whose sizes differ, as an activation order with a short last group leaves them: padded, then put right."""
    random = np.random.default_rng(0)
    group_of = random.permutation(np.minimum(np.arange(37) // 16, 2))  # 16, 16 and 5 inputs
    codes = random.integers(0, 2**bits, (6, 37)).astype(np.uint8)
    scales = random.normal(size=(6, 3)).astype(np.float16).astype(np.float32)
    zeros = random.integers(0, 2**bits, (6, 3)).astype(np.uint8)
    layer = from_stored(PackedGrid(codes, scales, zeros, group_of, bits, np.float16))
    wanted = (codes - zeros[:, group_of].astype(np.float32)) * scales[:, group_of]
    assert np.array_equal(layer.weight.numpy(), wanted)
    assert layer.in_features == 37 and layer(torch.ones(2, 37)).shape == (2, 6)


@pytest.mark.parametrize("name", ["gptq-act-order", "nf4-double", pytest.param("awq", marks=pytest.mark.slow)])
def test_trained_as_it_is_then_merged_into_it(name: str, quantized: Get, text: Path, tmp_path: Path) -> None:
    base = quantized(name)
    done = train(base, text, tmp_path / "a", eval_data=text, **RUN)
    assert done.evaluations[-1]["eval_loss"] < done.evaluations[0]["eval_loss"]
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.base_grid is None and adapter.base_model == str(base)
    trained_on = train(as_floats(base, name, tmp_path / "floats"), text, tmp_path / "b", eval_data=text, **RUN)
    # folded blocks on the float base, a branch here: the same maths, summed in another order
    assert trained_on.evaluations[-1]["eval_loss"] == pytest.approx(done.evaluations[-1]["eval_loss"], abs=1e-4)

    manifest = merge(base, tmp_path / "a", tmp_path / "merged")
    assert {entry["action"] for entry in manifest["modules"]} == {"merged"}
    checkpoint, source = Checkpoint.open(tmp_path / "merged"), Checkpoint.open(base)
    for module in adapter.modules.values():
        after, before = stored(checkpoint, module.name), stored(source, module.name)
        assert after is not None and before is not None
        wanted = add_to_weight(before.unpacked().values(), module.blocks)
        error = np.abs(after.unpacked().values() - wanted)
        assert error.max() <= 0.35 * np.abs(wanted).max()  # a step of the grid, see test_hf_packed
    with torch.no_grad():
        merged = load_base(tmp_path / "merged", "causal-lm")[0](IDS).logits
        tuned = load_tuned(base, adapter)[0](IDS).logits
        plain = load_base(base, "causal-lm")[0](IDS).logits
    wanted_effect, effect = (tuned - plain).flatten(), (merged - plain).flatten()
    assert torch.nn.functional.cosine_similarity(wanted_effect, effect, dim=0) > 0.5  # four steps: small blocks


def test_a_run_is_resumed_to_the_same_bits(quantized: Get, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    base, how = quantized("awq"), {**RUN, "checkpoint_every": 2}
    train(base, text, tmp_path / "whole", **how)

    def add(self: History, **record: Any) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(History, "add", add)
        with pytest.raises(KeyboardInterrupt):
            train(base, text, tmp_path / "parts", **how)
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.qweight"] ^= 1  # no target
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="base"):
        train(other, text, tmp_path / "parts", resume=True, **how)
    train(base, text, tmp_path / "parts", resume=True, **how)
    parts, whole = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("parts", "whole"))
    assert parts == whole


def test_a_fresh_head_and_labels(quantized: Get, tmp_path: Path) -> None:
    lines = [{"text": f"the {'cat' if n % 2 else 'dog'} sat", "label": n % 2} for n in range(8)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = quantized("compressed-tensors")
    train(base, tmp_path / "labels.jsonl", tmp_path / "a", task="text-classification", **RUN)
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.labels == ["0", "1"] and adapter.modules_to_save == ["score"]
    assert isinstance(load_tuned(base, adapter)[0], nn.Module)


def test_a_dry_run_counts_packed_weights(quantized: Get, text: Path, tmp_path: Path) -> None:
    plans = [train(quantized(name), text, tmp_path / "a", dry_run=True, **RUN).plan for name in ("awq", "nf4")]
    assert all(plan is not None for plan in plans)
    counts = [plan["parameters"] for plan in plans if plan is not None]
    assert counts[0] == counts[1] > 100_000


def test_a_sweep_over_blocks(quantized: Get, text: Path, tmp_path: Path) -> None:
    base = quantized("awq")
    how: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "max_length": 16, "eval_data": text}
    results = sweep(base, text, tmp_path / "s", methods=["diablo"], lr=[0.02], num_blocks=[4, 8], seeds=[3], **how)
    found = {result["num_blocks"]: result["eval_loss"] for result in results}
    done = train(base, text, tmp_path / "a", **{**RUN, **how})
    assert set(found) == {None, 4, 8}  # the base itself, and the two counts
    assert found[4] == done.evaluations[-1]["eval_loss"] != found[8], "a trial is what train trains"


def test_what_a_model_lacks_is_said_of_its_own_folder(quantized: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    broken = shutil.copytree(quantized("awq"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"/broken: has no tensor for the parameter model\.norm\.weight"):
        export(broken, tiny_adapter("llama"), tmp_path / "out")


def test_the_view_of_floats_copies_no_weights(quantized: Get, tmp_path: Path) -> None:
    base = shutil.copytree(quantized("awq"), tmp_path / "base")
    for name in ("pytorch_model.bin", "model.gguf", "model.safetensors.index.json"):
        (base / name).write_text("{}")
    view = float_view(Checkpoint.open(base))
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in view.folder.iterdir()} == names


def test_gpt2_is_merged_into_and_no_base(tiny_model: Get, tiny_adapter: Get, text: Path, tmp_path: Path) -> None:
    """Its Conv1D are (in, out) as floats, and codes of them (out, in) as of any layer."""
    base = shutil.copytree(tiny_model("gpt2"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("c_proj.weight", "c_fc.weight"))]:
        parts = packed.gptq(np.ascontiguousarray(tensors.pop(name).T))
        tensors |= {name.removesuffix("weight") + key: part for key, part in parts.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": packed.FORMATS["gptq"][0]}
    (base / "config.json").write_text(json.dumps(config))
    manifest = merge(base, tiny_adapter("gpt2"), tmp_path / "merged")
    gains = [entry["weight_gain"] for entry in manifest["modules"]]
    assert len(gains) == 8 and min(gains) > 0.8  # blocks of a size with the weights
    for road in (lambda: train(base, text, tmp_path / "a", **RUN), lambda: export(base, tiny_adapter("gpt2"), "x")):
        with pytest.raises(CheckpointError, match="gpt2 keeps its weights the other way round, and codes of them are"):
            road()


def test_refusals(quantized: Get, tiny_model: Get, tiny_adapter: Get, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantized already; leave out --base-quantize"):
        train(quantized("awq"), text, tmp_path / "a", base_quantize="int4", **RUN)
    with pytest.raises(CheckpointError, match="blocks begin at the float weights, which it no longer has"):
        train(quantized("awq"), text, tmp_path / "a", base_quantize="int4", on_grid=True, **RUN)
    with pytest.raises(InputError, match="is quantized, and --methods has lora, which train on float weights only"):
        sweep(quantized("awq"), text, tmp_path / "s", methods=["diablo", "lora"], eval_fraction=0.3)
    train(quantized("awq"), text, tmp_path / "a", **RUN)
    with pytest.raises(AdapterError, match="10 of 10 modules do not fit"):
        merge(tiny_model("llama"), tmp_path / "a", tmp_path / "out")
    broken = tmp_path / "broken"
    packed.make(tiny_model("llama"), broken, *packed.FORMATS["awq"][:2])
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="7 quantized weights are no linear layers of the model"):
        load_base(broken, "causal-lm")


def test_parity_holds_a_merge_against_the_fine_tune(quantized: Get, text: Path, tmp_path: Path) -> None:
    """Its base is quantized itself, and so has no error of its own that a merge could be held against."""
    verdicts = {}
    for name in ("gptq-8-bits", "gptq"):
        train(quantized(name), text, tmp_path / f"a-{name}", **RUN | {"lr": 0.005})
        merge(quantized(name), tmp_path / f"a-{name}", tmp_path / name)
        report = parity(tmp_path / name, data=text)
        figures = {check["name"]: check["value"] for check in report["checks"]}
        assert not {"kl.ratio", "top1_agreement.drop"} & set(figures)
        verdicts[name] = report["verdict"], [c["name"] for c in report["checks"] if not c["pass"]]
        assert (figures["kl.share"] < 0.01) == (name == "gptq-8-bits")  # 16 times finer steps
    assert verdicts["gptq-8-bits"] == ("pass", []) and "kl.share" in verdicts["gptq"][1]


def test_an_adapter_trained_beside_a_grid_meets_a_quantized_checkpoint(
    quantized: Get, tiny_model: Get, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on with the blocks that it has: the float weights, which lay on its grid, are not there."""
    train(tiny_model("llama"), text, tmp_path / "a", **RUN, base_quantize="int4")
    before = Adapter.load(tmp_path / "a")
    run = RUN | {"lr": 1e-30, "max_steps": 1}
    train(quantized("awq"), text, tmp_path / "b", init_adapter=tmp_path / "a", **run)
    for name, module in Adapter.load(tmp_path / "b").modules.items():
        assert np.array_equal(module.blocks, before.modules[name].blocks)
    caplog.clear()
    with caplog.at_level("WARNING", "diablo_export"):
        export(quantized("awq"), tmp_path / "a", tmp_path / "out")
    assert "are not the very ones" in caplog.text and "base here is float" not in caplog.text
    tuned, _ = load_tuned(quantized("awq"), before)
    head = load_base(quantized("awq"), "causal-lm")[0].get_parameter("lm_head.weight")
    assert torch.equal(tuned.get_parameter("lm_head.weight"), head)  # as the export has it


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("awq", "MatMulNBits"),
        ("gptq-act-order", "MatMul"),
        pytest.param("gptq-asym-v2", "MatMulNBits", marks=pytest.mark.slow),
        pytest.param("nf4", "MatMul", marks=pytest.mark.slow),
    ],
)
def test_exported_with_the_codes_that_it_has(name: str, op: str, quantized: Get, text: Path, tmp_path: Path) -> None:
    base = quantized(name)
    train(base, text, tmp_path / "a", **RUN)
    manifest = export(base, tmp_path / "a", tmp_path / "out")
    assert manifest["quantize"] == ("int4" if op == "MatMulNBits" else "none")
    nodes = list(onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.node)
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == (14 if op == "MatMulNBits" else 0)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    if name == "awq":
        report = parity(tmp_path / "out", data=text)
        assert not [check for check in report["checks"] if not check["pass"]]
        assert report["adapter"]["alive"]
    run = runner(exact(tmp_path / "out"))
    with torch.no_grad():
        tuned = load_tuned(base, Adapter.load(tmp_path / "a"))[0](torch.from_numpy(RUNNER_IDS)).logits.numpy()
    found = run(tmp_path / "out/adapters/a.onnx_adapter")
    assert np.abs(found - tuned.reshape(found.shape)).max() <= LOGITS
    with pytest.raises(ExportError, match="its weights are quantized already"):
        export(base, tmp_path / "a", tmp_path / "again", quantize="int4")
