"""Adapter folders go both ways between this project and PEFT, and training through HF Trainer and TRL ends in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytest.importorskip("peft")

from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel, get_peft_model

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.errors import AdapterError
from diablo_export.peft import DiabloConfig
from diablo_export.trainer.train import train
from tests.onnx_runs import IDS, LOGITS, in_torch, runner

Folder = Callable[[str], Path]
AUTO = {
    "llama": AutoPeftModelForCausalLM,
    "gpt2": AutoPeftModelForCausalLM,
    "bert": AutoPeftModelForSequenceClassification,
}


@torch.no_grad()
def logits(model: Any) -> Any:
    return model.eval()(input_ids=torch.from_numpy(IDS)).logits.numpy()


def assert_same(one: Adapter, other: Adapter) -> None:
    """The same modules, blocks, fingerprints and head."""
    assert one.modules.keys() == other.modules.keys() and one.saved.keys() == other.saved.keys()
    for name, module in one.modules.items():
        mate = other.modules[name]
        assert np.array_equal(module.blocks, mate.blocks) and module.shape == mate.shape
        assert module.fingerprint and mate.fingerprint
        assert module.fingerprint.to_json() == mate.fingerprint.to_json()
    assert all(np.array_equal(value, other.saved[name]) for name, value in one.saved.items())
    assert (one.task_type, one.base_model, one.labels) == (other.task_type, other.base_model, other.labels)
    assert one.num_blocks == other.num_blocks and one.target_modules == other.target_modules


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_our_folder_loads_and_saves_unchanged(
    architecture: str, tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    adapter = tiny_adapter(architecture)
    model = AUTO[architecture].from_pretrained(adapter)
    # the same blocks, in the same operations
    assert np.array_equal(logits(model), in_torch(tiny_model(architecture), adapter))
    model.save_pretrained(tmp_path / "plain")
    assert_same(Adapter.load(tmp_path / "plain"), Adapter.load(adapter))
    if architecture != "bert":  # PEFT merges into one head only, so it refuses to save while there are two
        model.merge_adapter()
        model.save_pretrained(tmp_path / "merged")
        assert_same(Adapter.load(tmp_path / "merged"), Adapter.load(adapter))


@pytest.mark.parametrize("part", ["model", "layers"])
def test_compiled_models_save_and_load_the_same_folder(
    part: str, tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    """torch.compile puts a module around what it compiles, whose name gets into all names below it."""

    def compiled() -> Any:
        base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
        if part == "model":
            return torch.compile(base, backend="eager")
        for index, layer in enumerate(base.model.layers):
            base.model.layers[index] = torch.compile(layer, backend="eager")
        return base

    loaded = PeftModel.from_pretrained(compiled(), tiny_adapter("llama"))
    assert np.array_equal(logits(loaded), in_torch(tiny_model("llama"), tiny_adapter("llama")))
    loaded.save_pretrained(tmp_path / "loaded")
    assert_same(Adapter.load(tmp_path / "loaded"), Adapter.load(tiny_adapter("llama")))
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    fresh = get_peft_model(compiled(), config)
    fresh.save_pretrained(tmp_path / "fresh")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), tmp_path / "fresh")
    assert np.array_equal(logits(plain), logits(fresh))


def test_a_folder_that_lacks_blocks_is_refused(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_adapter("llama"), tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.diablo_blocks"
    blocks = tensors.pop(name)
    save_file({**tensors, name.replace("layers.0", "layers.7"): blocks}, folder / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    match = r"(?s)layers.0.mlp.up_proj: .* has no blocks for it.*layers.7.mlp.up_proj: has blocks, .* does not list it"
    with pytest.raises(AdapterError, match=match):
        PeftModel.from_pretrained(base, folder)


def test_the_grid_of_a_base_is_kept_and_told(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path, recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = json.loads((tiny_adapter("llama") / "adapter_config.json").read_text())
    grid = {"bits": 4, "group_size": 32, "symmetric": True, "on_grid": False}
    shutil.copytree(tiny_adapter("llama"), tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({**config, "base_quantization": grid}))
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["base_quantization"] == grid
    assert "trained beside int4 in groups of 32, symmetric weights" in caplog.text
    assert not [one for one in recwarn if "base_quantization" in str(one.message)]


def test_an_adapter_of_train_gives_the_same_logits(tiny_model: Folder, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat on the log. " * 12}) + "\n")
    train(tiny_model("llama"), data, tmp_path / "adapter", num_blocks=4, lr=0.02, max_steps=3, max_length=16)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    before = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert np.array_equal(tuned, in_torch(tiny_model("llama"), tmp_path / "adapter"))
    assert np.abs(tuned - before).max() > 0.1  # alive: the tuned model is another one


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Twelve rows of the same eight tokens, labelled."""

    def __init__(self, label: Any) -> None:
        self.label = label

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = [5, 17, 54, 3, 90, 41, 7, 20 + index % 2]
        return {"input_ids": ids, "labels": ids if self.label is None else index % 2}


def trained(model: Any, folder: Path, label: Any) -> list[float]:
    """Losses of five steps of the HF Trainer, which also saves its last step under `folder`."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, learning_rate=0.02, use_cpu=True,
        logging_steps=1, save_steps=5, report_to=[], disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(label))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def causal(tiny_model: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[float]]:
    """A Llama trained by the HF Trainer through PEFT: its checkpoint folder, its logits and its losses."""
    folder = tmp_path_factory.mktemp("trainer")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model("llama")), DiabloConfig(num_blocks=4, task_type="CAUSAL_LM")
    )
    losses = trained(model, folder, None)
    return folder / "checkpoint-5", logits(model), losses


def test_hf_trainer_learns_and_saves_an_adapter(causal: tuple[Path, Any, list[float]], tiny_model: Folder) -> None:
    folder, tuned, losses = causal
    assert losses[-1] < losses[0] / 2
    adapter = Adapter.load(folder)
    assert len(adapter.modules) == 10 and adapter.num_blocks == 4 and adapter.base_model == str(tiny_model("llama"))
    adapter.check_base(Checkpoint.open(tiny_model("llama")))
    # the same blocks in the same operations, read back
    assert np.array_equal(in_torch(tiny_model("llama"), folder), tuned)


def test_what_peft_saved_is_merged_and_exported(
    causal: tuple[Path, Any, list[float]], tiny_model: Folder, tmp_path: Path
) -> None:
    folder, tuned, _ = causal
    merge(tiny_model("llama"), folder, tmp_path / "merged")
    np.testing.assert_allclose(in_torch(tmp_path / "merged"), tuned, rtol=0, atol=LOGITS)
    export(tiny_model("llama"), {"a": folder}, tmp_path / "branch")
    run = runner(tmp_path / "branch" / "model.onnx")
    exported = run(tmp_path / "branch" / "adapters" / "a.onnx_adapter")
    np.testing.assert_allclose(exported, tuned, rtol=0, atol=LOGITS)
    assert np.abs(run() - tuned).max() > 0.1  # without the adapter it is the base


def test_a_classifier_with_its_head(tiny_model: Folder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model("bert"), id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    model = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    trained(model, tmp_path / "run", True)
    model.save_pretrained(tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    assert adapter.labels == ["no", "yes"] and adapter.modules_to_save == ["classifier"]
    stored = Checkpoint.open(tiny_model("bert")).tensors["classifier.weight"].read()
    assert not np.array_equal(adapter.saved["classifier.weight"], stored)  # the head was trained, too
    assert np.array_equal(in_torch(tiny_model("bert"), tmp_path / "adapter"), logits(model))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert np.array_equal(logits(loaded), logits(model))
    turned = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), id2label={0: "yes", 1: "no"})
    with pytest.raises(AdapterError, match="the adapter's classes are no, yes, the model's yes, no; load"):
        PeftModel.from_pretrained(turned, tmp_path / "adapter")


def test_a_head_of_several_layers_is_loaded_whole(tmp_path: Path) -> None:
    """The format lists a head's layers, PEFT wraps the head: RoBERTa's has two."""
    config = transformers.RobertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    torch.manual_seed(0)
    base = transformers.RobertaForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        DiabloConfig(num_blocks=4, target_modules=["query"], init_weights=False, task_type="SEQ_CLS"),
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and "classifier" in name:
                value.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter").modules_to_save == ["classifier.dense", "classifier.out_proj"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert np.array_equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter")), logits(model))
    other = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=2, ignore_mismatched_sizes=True
    )
    with pytest.raises(AdapterError, match=r"3 classes .* the model 2; load the model with num_labels=3"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_named_adapters_are_saved_apart(tiny_model: Folder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=["q_proj"], init_weights=False))
    model.add_adapter("other", DiabloConfig(num_blocks=8, target_modules=r".*\.1\..*_proj", init_weights=False))
    model.save_pretrained(tmp_path)
    first, other = Adapter.load(tmp_path), Adapter.load(tmp_path / "other")
    assert sorted(first.modules) == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert len(other.modules) == 7 and other.num_blocks == 8
    assert set(other.target_modules) == set(other.modules)  # a regular expression is written out as names


def test_transformers_own_loader_refuses_rather_than_leave_the_blocks_at_zero(
    tiny_model: Folder, tiny_adapter: Folder
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"does not fill these blocks; .* peft.PeftModel.from_pretrained"):
        base.load_adapter(str(tiny_adapter("llama")))
    with pytest.raises(ValueError, match="does not fill these blocks"):
        AutoModelForCausalLM.from_pretrained(tiny_adapter("llama"))


def test_trl_supervised_and_preferences(tiny_model: Folder, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = tiny_model("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.02, "use_cpu": True, "bf16": False,
        "logging_steps": 1, "report_to": [], "disable_tqdm": True, "max_length": 32,
    }  # fmt: skip
    texts = datasets.Dataset.from_list([{"text": "the cat sat on the mat"}, {"text": "the dog sat on the log"}] * 4)
    tuner = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=trl.SFTConfig(output_dir=str(tmp_path / "1"), **options),
        train_dataset=texts, processing_class=tokenizer, peft_config=DiabloConfig(num_blocks=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    tuner.train()
    tuner.save_model(str(tmp_path / "tuned"))
    Adapter.load(tmp_path / "tuned").check_base(Checkpoint.open(model))

    pairs = [{"prompt": "the cat sat on", "chosen": " the mat", "rejected": " the log"}] * 8
    preferring = trl.DPOTrainer(
        model=AutoPeftModelForCausalLM.from_pretrained(tmp_path / "tuned", is_trainable=True),
        args=trl.DPOConfig(output_dir=str(tmp_path / "2"), **options), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(pairs),
    )  # fmt: skip
    preferring.train()
    losses = [entry["loss"] for entry in preferring.state.log_history if "loss" in entry]
    # the reference is the adapter as it came, so nothing is preferred yet: the loss is log 2, to float32
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < losses[0]
    preferring.save_model(str(tmp_path / "preferring"))
    Adapter.load(tmp_path / "preferring").check_base(Checkpoint.open(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_base(bits: int, tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"), quantization_config=quantized, device_map="cpu", dtype=torch.float32
    )
    before = logits(base)
    model = PeftModel.from_pretrained(base, tiny_adapter("llama"))
    assert np.abs(logits(model) - before).max() > 0.1
    with pytest.raises(ValueError, match=f"quantized layers .*q_proj: Linear{bits}bit"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    assert_same(Adapter.load(tmp_path), Adapter.load(tiny_adapter("llama")))  # fingerprints of the float base, kept
