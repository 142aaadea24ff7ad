"""Bases on the grid that ships: the same numbers as the export, in memory at their packed size, trained and resumed."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from transformers.pytorch_utils import Conv1D

from diablo_export.adapter import Adapter
from diablo_export.base_grid import BaseGrid
from diablo_export.converters.export import export
from diablo_export.errors import AdapterError, CheckpointError, InputError
from diablo_export.quantization import dequantize, quantize
from diablo_export.trainer.history import History
from diablo_export.trainer.initial import begin_at
from diablo_export.trainer.model import attach, load_base, load_tuned
from diablo_export.trainer.packed_layer import QuantizedLinear
from diablo_export.trainer.quantized import pack_base
from diablo_export.trainer.train import train
from tests.onnx_runs import IDS, LOGITS, runner

Get = Callable[[str], Path]
RUN: dict[str, Any] = {"num_blocks": 4, "lr": 0.02, "max_steps": 4, "batch_size": 2, "max_length": 16, "seed": 3}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.jsonl").write_text(json.dumps({"text": "the cat sat on the mat and the dog on the log. " * 12}))
    lines = [{"text": f"the {'cat' if n % 2 else 'dog'} sat", "label": n % 2} for n in range(12)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def exact(folder: Path) -> Path:
    """A copy of model.onnx whose kernels keep activations in float32: by default they round them to int8."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for attribute in (each for node in model.graph.node for each in node.attribute if each.name == "accuracy_level"):
        attribute.i = 1
    onnx.save(model, folder / "exact.onnx")
    return folder / "exact.onnx"


def packed(base: Path, adapter: Adapter) -> torch.nn.Module:
    """The network as it was while it was trained."""
    task = "text-classification" if adapter.saved else "causal-lm"
    network, _ = load_base(base, task, labels=adapter.labels or None)
    attach(network, adapter)
    assert adapter.base_grid is not None
    pack_base(network, adapter.base_grid, leave=adapter.modules_to_save)
    return network


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_layer_has_the_numbers_of_the_codec(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    grid = BaseGrid(bits, 16, symmetric)
    for linear in (torch.nn.Linear(40, 24), Conv1D(24, 40)):  # 40 inputs: the last group is padded
        torch.nn.init.normal_(linear.bias)
        weight = linear.weight.detach() if isinstance(linear, torch.nn.Linear) else linear.weight.detach().T
        layer = QuantizedLinear.from_linear(linear, grid)
        stored = quantize(np.ascontiguousarray(weight.numpy()), bits, 16, symmetric)
        assert np.array_equal(layer.weight.numpy(), dequantize(stored))
        x = torch.randn(3, 5, 40, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, torch.nn.functional.linear(x, layer.weight, linear.bias))
        y.backward(upstream := torch.randn_like(y))
        assert torch.equal(x.grad, upstream @ layer.weight)  # type: ignore[arg-type]


def test_nothing_of_a_weights_size_outlives_a_pass() -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(256, 256), BaseGrid(4, 32, True))
    assert sum(buffer.nbytes for buffer in layer.buffers()) < 256 * 256 * 0.65 + 4 * 256  # 4 bits, 4 bytes of 32, bias
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = layer(torch.randn(2, 256, requires_grad=True))
    assert not kept and y.requires_grad


def test_bfloat16_products_train_beside_packed_weights() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 32), BaseGrid(4, 32, True))
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    # bfloat16 keeps 8 bits, and the products of 64 terms are summed in float32
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, -1), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("architecture", "bits", "more"),
    [
        ("llama", 4, {}),  # by onnxruntime-genai's builder
        ("llama-tied", 2, {}),  # the head is quantized, the embedding that it shares is not
        pytest.param("gpt2", 8, {"group_size": 16}, marks=pytest.mark.slow),  # by torch; Conv1D
        ("bert", 4, {}),  # groups of 16 with zero points; its head stays float
    ],
)
def test_what_was_trained_is_what_ships(
    architecture: str, bits: int, more: dict[str, Any], tiny_model: Get, texts: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    base, classify = tiny_model(architecture), architecture == "bert"
    data, task = ("labels.jsonl", "text-classification") if classify else ("text.jsonl", "causal-lm")
    train(base, texts / data, tmp_path / "a", task=task, base_quantize=f"int{bits}", **more, **RUN)
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.base_grid == BaseGrid(bits, 16 if classify or more else 32, symmetric=not classify)
    export(base, tmp_path / "a", tmp_path / "out", quantize=f"int{bits}")  # its grid is the adapter's
    assert not [one for one in caplog.messages if "trained beside" in one]
    run = runner(exact(tmp_path / "out"))
    found = run(tmp_path / "out/adapters/a.onnx_adapter")
    with torch.no_grad():
        trained = packed(base, adapter)(torch.from_numpy(IDS)).logits.numpy()
        tuned = load_tuned(base, adapter)[0](torch.from_numpy(IDS)).logits.numpy()
        as_float = load_base(base, task)[0](torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(found - trained.reshape(found.shape)).max() <= LOGITS
    assert np.abs(tuned - trained).max() <= LOGITS, "parity's reference is the trained model"
    assert np.abs(trained - as_float).max() > 100 * LOGITS


def test_another_grid_is_warned_of(
    tiny_model: Get, texts: Path, tmp_path: Path, run: Callable[..., Result], caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_model("llama")
    train(base, texts / "text.jsonl", tmp_path / "a", base_quantize="int4", **RUN)
    export(base, tmp_path / "a", tmp_path / "out", quantize="int4", group_size=16)
    assert "the base here is int4 in groups of 16, symmetric" in caplog.text
    caplog.clear()
    assert run("merge", "-m", base, "-a", tmp_path / "a", "-o", tmp_path / "hf").exit_code == 0
    assert "the base here is float" in caplog.text


def test_an_interrupted_run_ends_in_the_same_bits(
    tiny_model: Get, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**RUN, "base_quantize": "int4", "on_grid": True}
    train(tiny_model("gpt2"), texts / "text.jsonl", tmp_path / "whole", **how)

    def add(self: History, **record: Any) -> None:
        original(self, **record)
        if record["step"] == 2 and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    original = History.add
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(History, "add", add)
        train(tiny_model("gpt2"), texts / "text.jsonl", tmp_path / "a", **how)
    with pytest.raises(InputError, match=r"base_quantization was .*, now it is null"):
        train(tiny_model("gpt2"), texts / "text.jsonl", tmp_path / "a", resume=True, **RUN)
    train(tiny_model("gpt2"), texts / "text.jsonl", tmp_path / "a", resume=True, **how)
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_adapters_blocks_are_a_beginning(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """On another grid, base + blocks begin where the adapter was trained to be; the head comes along."""
    base, given = tiny_model("bert"), Adapter.load(tiny_adapter("bert"))
    grid = BaseGrid(4, 16, symmetric=False)
    from diablo_export.checkpoint import Checkpoint
    from diablo_export.trainer.layer import diablo_layers
    from diablo_export.trainer.targets import wrap_targets

    for to in (None, grid):
        network, _ = load_base(base, "text-classification")
        own = {name: dict(network.named_modules())[name].weight.detach().numpy() for name in given.modules}
        wrap_targets(network, list(given.modules), 4)
        if to is not None:
            pack_base(network, to, leave=given.modules_to_save)
        head = {name: dict(network.named_parameters())[name] for name in given.saved}
        begin_at(network, head, given, Checkpoint.open(base), to)
        for name, layer in diablo_layers(network).items():
            wanted = own[name] - layer.weight.detach().numpy()  # W0 − Wq
            for block, (inputs, outputs) in enumerate(layer.shape.slices()):
                found = layer.blocks[block].detach().numpy()[: inputs.stop - inputs.start]
                expected = given.modules[name].blocks[block][: inputs.stop - inputs.start]
                moved = wanted[outputs, inputs].T
                # two differences of float32 weights of about 0.5
                assert np.allclose(found, expected + moved, atol=1e-6)
        assert all(np.array_equal(head[name].detach().numpy(), value) for name, value in given.saved.items())


def test_an_adapter_that_does_not_fit_is_no_beginning(
    tiny_model: Get, tiny_adapter: Get, texts: Path, tmp_path: Path
) -> None:
    base, data = tiny_model("llama"), texts / "text.jsonl"
    with pytest.raises(AdapterError, match=r"blocks of \(2, .* are to be trained, the adapter's are \(4, "):
        train(base, data, tmp_path / "a", init_adapter=tiny_adapter("llama"), **{**RUN, "num_blocks": 2})
    with pytest.raises(AdapterError, match="has blocks, and is not among the target modules"):
        train(base, data, tmp_path / "a", init_adapter=tiny_adapter("llama"), target_modules="q_proj", **RUN)
    with pytest.raises(AdapterError, match="does not belong to the model"):
        train(tiny_model("qwen2"), data, tmp_path / "a", init_adapter=tiny_adapter("llama"), **RUN)
    given = Adapter.load(tiny_adapter("llama"))
    whole = {"lm_head.weight": np.ones((320, 64), np.float32)}  # as PEFT's modules_to_save has it trained
    (tmp_path / "whole").mkdir()
    dataclasses.replace(given, saved=whole).save(tmp_path / "whole")
    with pytest.raises(AdapterError, match=r"lm_head\.weight: the adapter has it whole, and this run trains it not"):
        train(base, data, tmp_path / "a", init_adapter=tmp_path / "whole", **{**RUN, "num_blocks": None})
    done = train(base, data, tmp_path / "a", init_adapter=tiny_adapter("llama"), **{**RUN, "num_blocks": None})
    assert Adapter.load(done.output).num_blocks == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_quantize": "int3"}, "--base-quantize is 'int3'; it must be one of none, int8, int4, int2"),
        ({"on_grid": True, "group_size": 32}, "--on-grid, --group-size: only a quantized base has a grid"),
        ({"base_quantize": "int4", "group_size": 24}, "4 bits in groups of 24: bits must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tiny_model: Get, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_model("llama"), texts / "text.jsonl", tmp_path / "a", **RUN, **options)
    assert not list(tmp_path.iterdir())


def test_an_onnx_base_is_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.onnx").touch()
    for place in (tmp_path / "model", tmp_path / "model/model.onnx"):
        with pytest.raises(CheckpointError, match="an ONNX model, which cannot be trained; give the Hugging Face"):
            train(place, texts / "text.jsonl", tmp_path / "a", **RUN)


def test_a_broken_record_is_refused(tiny_adapter: Get, tmp_path: Path) -> None:
    for file in tiny_adapter("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for wrong in ({"bits": 3, "group_size": 32, "symmetric": True}, {"bits": 4}, [4]):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_quantization": wrong}))
        with pytest.raises(AdapterError, match="broken base_quantization"):
            Adapter.load(tmp_path)
