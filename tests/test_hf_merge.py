"""Hugging Face to Hugging Face merges against the slow obvious way, on every architecture."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import BlockShape, dense
from diablo_export.checkpoint import INDEX, SINGLE, Checkpoint
from diablo_export.converters import hf_stream
from diablo_export.converters.hf_merge import MergeResult, hf_merge
from diablo_export.errors import AdapterError, CheckpointError
from diablo_export.fingerprint import fingerprint
from tests.tiny import ARCHITECTURES, SIZES, rewrite

Folder = Callable[[str], Path]


def merge(model: Path, adapter: Adapter, folder: Path) -> MergeResult:
    folder.mkdir()
    return hf_merge(model, adapter, folder)


def expected(tensors: dict[str, Any], adapter: Adapter, transposed: bool) -> dict[str, Any]:
    """Every weight plus its dense block diagonal, the obvious way."""
    merged = dict(tensors)
    for name, adapted in adapter.modules.items():
        weight = tensors[f"{name}.weight"]
        delta = dense(adapted.blocks, adapted.in_features, adapted.out_features)  # (in, out)
        total = weight.astype(np.float32) + (delta if transposed else delta.T)
        merged[f"{name}.weight"] = total.astype(weight.dtype)
    return {**merged, **adapter.saved}


def remark(adapter: Adapter, model: Path) -> Adapter:
    """The adapter with the fingerprints of another copy of its base."""
    checkpoint = Checkpoint.open(model)
    modules = {}
    for name, adapted in adapter.modules.items():
        info = checkpoint.find(f"{name}.weight")
        assert info is not None
        modules[name] = replace(adapted, fingerprint=fingerprint(info.read()))
    return replace(adapter, modules=modules)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_dense_sum_and_changes_nothing_else(
    architecture: str, tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    base, adapter = tiny_model(architecture), Adapter.load(tiny_adapter(architecture))
    result = merge(base, adapter, tmp_path / "out")
    before, after = load_file(base / SINGLE), load_file(tmp_path / "out" / SINGLE)
    wanted = expected(before, adapter, transposed=architecture == "gpt2")
    assert after.keys() == wanted.keys()
    for name, value in wanted.items():  # same additions in the same order: no tolerance
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert {entry["name"] for entry in result.modules} == set(adapter.modules)
    assert all(np.any(after[f"{name}.weight"] != before[f"{name}.weight"]) for name in adapter.modules)


def test_loads_in_transformers_with_the_logits_of_a_wrapped_model(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base, adapter = tiny_model("gpt2"), Adapter.load(tiny_adapter("gpt2"))
    merge(base, adapter, tmp_path / "out")
    tuned = AutoModelForCausalLM.from_pretrained(base)
    for name, adapted in adapter.modules.items():
        delta = torch.from_numpy(dense(adapted.blocks, adapted.in_features, adapted.out_features))
        tuned.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, delta=delta: output + inputs[0] @ delta
        )
    tokens = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        wanted = tuned(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    # float32 sums in another order, over logits of about 5
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_result_hashes_the_weight_files_and_the_rest_is_copied(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    (base / ".cache").mkdir()
    result = merge(base, Adapter.load(tiny_adapter("llama")), tmp_path / "out")
    weights = (tmp_path / "out" / SINGLE).read_bytes()
    assert result.hashes == {SINGLE: hashlib.sha256(weights).hexdigest()}
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", SINGLE}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_of_a_base_that_nobody_may_write_to(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (base / "more").mkdir()
    (base / "more" / "template.jinja").touch()
    folders = [base / "more", base]
    for folder in folders:
        folder.chmod(0o555)
    merge(base, Adapter.load(tiny_adapter("llama")), tmp_path / "out")
    for folder in folders:
        folder.chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")))
    assert (tmp_path / "out/more/template.jinja").is_file()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_rounded_once(dtype: Any, tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    base = rewrite(tiny_model("llama"), tmp_path / "base", lambda name, value: (name, value.astype(dtype)))
    adapter = remark(Adapter.load(tiny_adapter("llama")), base)
    merge(base, adapter, tmp_path / "out")
    before, after = Checkpoint.open(base).tensors, Checkpoint.open(tmp_path / "out").tensors
    wanted = expected({name: info.read() for name, info in before.items()}, adapter, transposed=False)
    for name, info in after.items():
        assert info.read().tobytes() == wanted[name].tobytes(), name


def test_blocks_below_the_rounding_of_the_checkpoint_are_said(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = rewrite(tiny_model("llama"), tmp_path / "base", lambda n, v: (n, v.astype(ml_dtypes.bfloat16)))
    whole = remark(Adapter.load(tiny_adapter("llama")), base)
    faint = replace(
        whole, modules={name: replace(m, blocks=m.blocks * np.float32(1e-5)) for name, m in whole.modules.items()}
    )
    with caplog.at_level("WARNING", "diablo_export"):
        result = merge(base, faint, tmp_path / "out")
    assert min(entry["weight_gain"] for entry in result.modules) < 0.9
    assert "float32 copy" in caplog.text and "k_proj keeps" in caplog.text


def test_sharded_checkpoints_keep_their_shards_order_and_metadata(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base, out = tmp_path / "base", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(base, max_shard_size="100KB")
    adapter = Adapter.load(tiny_adapter("llama"))
    result = merge(base, adapter, out)
    before, after = Checkpoint.open(base), Checkpoint.open(out)
    assert len(result.hashes) == len(before.files) > 2
    assert json.loads((out / INDEX).read_text()) == json.loads((base / INDEX).read_text())
    assert before.metadata == after.metadata
    for file in before.files:  # same header: same names, order, offsets
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (out / file.name).read_bytes()[:length] == file.read_bytes()[:length]
    whole = tmp_path / "whole"
    merge(tiny_model("llama"), adapter, whole)
    for name, value in load_file(whole / SINGLE).items():
        np.testing.assert_array_equal(after.tensors[name].read(), value)


def bare(model: Path, folder: Path) -> Path:
    """A classification model's encoder alone, as BertModel saves it."""

    def strip(name: str, value: Any) -> tuple[str, Any]:
        return name.removeprefix("bert."), value

    rewrite(model, folder, strip, architectures=["BertModel"])
    tensors = {k: v for k, v in load_file(folder / SINGLE).items() if not k.startswith("classifier")}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def test_bare_encoder_becomes_a_classifier(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    adapter = Adapter.load(tiny_adapter("bert"))
    merge(bare(tiny_model("bert"), tmp_path / "bare"), adapter, tmp_path / "out")
    merge(tiny_model("bert"), adapter, tmp_path / "whole")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    tokens = torch.arange(3, 40).reshape(1, -1)
    logits = []
    for folder in ("out", "whole"):
        model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    np.testing.assert_array_equal(
        load_file(tmp_path / "out" / SINGLE)["classifier.weight"], adapter.saved["classifier.weight"]
    )


def test_another_head_is_dropped_and_more_classes_are_written(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    def to_masked_lm(name: str, value: Any) -> tuple[str, Any]:
        return name.replace("classifier.", "cls.predictions."), value

    base = rewrite(tiny_model("bert"), tmp_path / "base", to_masked_lm, architectures=["BertForMaskedLM"])
    loaded = Adapter.load(tiny_adapter("bert"))
    saved = {"classifier.weight": np.ones((3, 64), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    merge(base, replace(loaded, saved=saved, labels=["a", "b", "c"]), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / SINGLE)
    assert tensors["classifier.weight"].shape == (3, 64)
    assert not [name for name in tensors if name.startswith("cls.")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_labels"] == 3


def test_parts_of_a_head_that_only_the_base_has_stay(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    """A classifier may have more outside of its encoder than its last layer: ModernBERT and DeBERTa have."""
    import torch
    import transformers

    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    config = transformers.ModernBertConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    transformers.ModernBertForMaskedLM(config).save_pretrained(tmp_path / "base")
    blocks = np.full((2, 32, 32), 0.1, np.float32)
    saved = {"classifier.weight": np.ones((3, 64), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    name = "model.layers.0.attn.Wo"
    adapter = Adapter({name: AdaptedModule(name, blocks, 64, 64)}, "SEQ_CLS", saved=saved, labels=["a", "b", "c"])
    merge(tmp_path / "base", adapter, tmp_path / "out")
    before, after = load_file(tmp_path / "base" / SINGLE), load_file(tmp_path / "out" / SINGLE)
    np.testing.assert_array_equal(after["head.dense.weight"], before["head.dense.weight"])
    assert not [name for name in after if name.startswith("decoder.")]
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]

    def without_pooler(name: str, value: Any) -> tuple[str, Any]:
        return name.replace("bert.pooler.", "cls.").replace("classifier.", "cls."), value

    base = rewrite(tiny_model("bert"), tmp_path / "bert", without_pooler, architectures=["BertForMaskedLM"])
    with pytest.raises(AdapterError, match=r"bert\.pooler\.dense\.weight: the classifier has it, and neither"):
        merge(base, Adapter.load(tiny_adapter("bert")), tmp_path / "bert-out")


def test_of_a_single_file_and_shards_the_single_file_is_the_model(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    """Shards saved into a folder leave its model.safetensors there, and that is what transformers then loads."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    other = AutoModelForCausalLM.from_pretrained(base)
    other.model.norm.weight.data.fill_(3)
    other.save_pretrained(base, max_shard_size="100KB")
    assert (base / SINGLE).exists() and (base / INDEX).exists()
    merge(base, Adapter.load(tiny_adapter("llama")), tmp_path / "out")
    merge(tiny_model("llama"), Adapter.load(tiny_adapter("llama")), tmp_path / "wanted")
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "wanted" / SINGLE).read_bytes()
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == [SINGLE]


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_adapted_head_that_is_tied_is_untied(stored: str, tiny_model: Folder, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def rename(name: str, value: Any) -> tuple[str, Any]:
        return stored if name == "model.embed_tokens.weight" else name, value

    base = rewrite(tiny_model("llama-tied"), tmp_path / "base", rename)
    embeddings = load_file(base / SINGLE)[stored]  # (320, 64)
    shape = BlockShape.for_linear(64, 320, 4)
    blocks = np.random.default_rng(0).normal(0, 0.1, shape.blocks).astype(np.float32)
    adapted = AdaptedModule("lm_head", blocks, 64, 320, fingerprint(embeddings))
    merge(base, Adapter({"lm_head": adapted}), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach().numpy(), embeddings)
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), embeddings + dense(blocks, 64, 320).T)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_embeddings_stay_where_an_adapter_brings_the_head_that_is_stored_for_both(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    def rename(name: str, value: Any) -> tuple[str, Any]:
        return "lm_head.weight" if name == "model.embed_tokens.weight" else name, value

    base = rewrite(tiny_model("llama-tied"), tmp_path / "base", rename)
    table = load_file(base / SINGLE)["lm_head.weight"]
    adapter = Adapter.load(tiny_adapter("llama-tied"))
    merge(base, replace(adapter, saved={"lm_head.weight": table + np.float32(1)}), tmp_path / "out")
    after = load_file(tmp_path / "out" / SINGLE)
    np.testing.assert_array_equal(after["model.embed_tokens.weight"], table)
    np.testing.assert_array_equal(after["lm_head.weight"], table + np.float32(1))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_other_weights_are_refused_naming_every_module(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    def disturb(name: str, value: Any) -> tuple[str, Any]:
        return name, value + np.float32(1e-3) if "self_attn" in name else value

    base = rewrite(tiny_model("llama"), tmp_path / "base", disturb)
    with pytest.raises(AdapterError, match=r"8 of 14 modules do not fit") as caught:
        merge(base, Adapter.load(tiny_adapter("llama")), tmp_path / "out")
    assert "model.layers.1.self_attn.o_proj: its base weight has other values" in str(caught.value)


def test_other_sizes_and_missing_modules_are_refused_together(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    first = next(iter(adapter.modules.values()))
    modules = {
        **adapter.modules,
        "model.layers.7.mlp.up_proj": replace(first, name="model.layers.7.mlp.up_proj"),
        first.name: replace(first, in_features=first.in_features - 1),
    }
    with pytest.raises(AdapterError, match=r"layers\.7\.mlp\.up_proj: the model has no such weight") as caught:
        merge(tiny_model("llama"), replace(adapter, modules=modules), tmp_path / "out")
    assert f"{first.name}: the model's weight is [" in str(caught.value)


def test_quantized_checkpoints_are_refused(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    base = rewrite(
        tiny_model("llama"), tmp_path / "base", lambda n, v: (n, v), quantization_config={"quant_method": "gptq"}
    )
    with pytest.raises(CheckpointError, match=r"quantized with GPTQ in None bits.*float model it was made from"):
        merge(base, Adapter.load(tiny_adapter("llama")), tmp_path / "out")


def test_integer_weights_are_refused(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    def truncate(name: str, value: Any) -> tuple[str, Any]:
        return name, value.astype(np.int8) if name.endswith("up_proj.weight") else value

    base = rewrite(tiny_model("llama"), tmp_path / "base", truncate)
    with pytest.raises(AdapterError, match=r"up_proj: its weight is stored as I8; blocks are added to F64, F32"):
        merge(base, Adapter.load(tiny_adapter("llama")), tmp_path / "out")


def test_overflow_is_refused(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    base = rewrite(tiny_model("llama"), tmp_path / "base", lambda n, v: (n, v.astype(np.float16)))
    adapter = remark(Adapter.load(tiny_adapter("llama")), base)
    huge = {name: replace(m, blocks=np.full_like(m.blocks, 1e5)) for name, m in adapter.modules.items()}
    with pytest.raises(AdapterError, match="base plus blocks overflows F16"):
        merge(base, replace(adapter, modules=huge), tmp_path / "out")


def test_a_shard_cut_short_is_refused(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    with (base / SINGLE).open("r+b") as file:
        file.truncate((base / SINGLE).stat().st_size - 10)
    with pytest.raises(CheckpointError, match="cut short"):
        merge(base, Adapter.load(tiny_adapter("llama")), tmp_path / "out")


def test_small_chunks_give_the_same_file(
    tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    whole = merge(tiny_model("llama"), adapter, tmp_path / "whole")
    monkeypatch.setattr(hf_stream, "CHUNK", 1000)
    assert merge(tiny_model("llama"), adapter, tmp_path / "pieces").hashes == whole.hashes


def test_the_verb_loads_neither_torch_nor_onnx_ir(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path) -> None:
    """They take longer to load than a small merge takes."""
    code = (
        "import sys, diablo_export\ndiablo_export.merge(*sys.argv[1:])\n"
        "found = {'torch', 'transformers', 'onnx_ir'} & set(sys.modules)\nassert not found, found"
    )
    places = [str(tiny_model("llama")), str(tiny_adapter("llama")), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("head", [False, True], ids=["in passing", "read again"])
def test_base_files_are_hashed(tiny_model: Folder, tiny_adapter: Folder, tmp_path: Path, head: bool) -> None:
    """A head in place of a stored one leaves a hole in what is read, so the file has to be read once more."""
    base, adapter = tiny_model("llama"), Adapter.load(tiny_adapter("llama"))
    if head:
        stored = load_file(base / SINGLE)
        adapter = replace(adapter, saved={"model.norm.weight": stored["model.norm.weight"] + 1})
    merged = merge(base, adapter, tmp_path / "out")
    digest = xxhash.xxh3_128((base / SINGLE).read_bytes()).hexdigest()
    assert merged.base == {SINGLE: digest}
