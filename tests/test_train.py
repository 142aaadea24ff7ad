"""The verb `train` from data file to adapter folder: every architecture, refusals; test_state.py has resuming."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BartConfig, BartForSequenceClassification

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import AdapterError, CheckpointError, DataError, InputError, OutputError
from diablo_export.trainer.data import Example
from diablo_export.trainer.model import load_base, load_tuned
from diablo_export.trainer.prepare import known_classes
from diablo_export.trainer.train import train
from tests import tiny
from tests.training import RUN, TEXT, log_of, same_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    lines = {
        "text.jsonl": [{"text": TEXT * 12}],
        "pairs.jsonl": [{"prompt": "the cat" * n, "completion": " sat on the mat"} for n in range(1, 7)],
        "labels.jsonl": [{"text": f"the {'cat' if n % 2 else 'dog'} sat", "label": n % 2} for n in range(12)],
        "words.jsonl": [{"text": f"the {a} sat", "label": a} for a in ("cat", "dog", "log")],
        "other.jsonl": [{"text": "the mat", "label": 2}],
        "same.jsonl": [{"text": "the mat", "label": 1}, {"text": "the log", "label": 1}],
        "one.jsonl": [{"text": "the mat", "label": 1}, {"text": "the log"}],
    }
    for name, values in lines.items():
        (path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_trains_and_loads(
    architecture: str, tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    classify = architecture == "bert"
    base, output = tiny_model(architecture), tmp_path / "adapter"
    done = train(
        base, folder / ("labels.jsonl" if classify else "text.jsonl"), output, num_blocks=4, max_steps=2, lr=0.05,
        batch_size=2, max_length=16, task="text-classification" if classify else "causal-lm",
    )  # fmt: skip
    adapter = Adapter.load(output)
    assert (done.steps, done.parameters) == (2, adapter.parameters)
    assert adapter.base_model == str(base) and adapter.num_blocks == 4
    assert all(module.blocks.any() and module.fingerprint for module in adapter.modules.values())
    adapter.check_base(Checkpoint.open(base))
    tuned, tokenizer = load_tuned(base, adapter)
    reference, _ = load_base(base, "text-classification" if classify else "causal-lm", labels=adapter.labels or None)
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    with torch.no_grad():
        assert (tuned(ids).logits - reference(ids).logits).abs().max() > 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "the run's own folder must be gone"


def test_bfloat16_base_keeps_its_fingerprint(folder: Path, tmp_path: Path) -> None:
    base = tiny.make_model("llama", tmp_path / "base")
    load_base(base, "causal-lm", dtype="bfloat16")[0].save_pretrained(base)
    for dtype in ("float32", "bfloat16"):
        train(base, folder / "text.jsonl", tmp_path / dtype, num_blocks=4, max_steps=2, max_length=16, dtype=dtype)
        adapter = Adapter.load(tmp_path / dtype)
        adapter.check_base(Checkpoint.open(base))
        assert {m.fingerprint.dtype for m in adapter.modules.values() if m.fingerprint} == {"BF16"}
        assert {m.blocks.dtype for m in adapter.modules.values()} == {np.dtype(np.float32)}


def test_training_learns_and_logs(tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    done = train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "adapter", **{**RUN, "max_steps": 30})
    records = log_of(tmp_path / "adapter")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
    assert [record["step"] for record in done.evaluations] == [*range(0, 31, 3)]
    # from random weights to a sentence nearly by heart: noise between steps is a few hundredths
    assert done.evaluations[-1]["eval_loss"] < done.evaluations[0]["eval_loss"] / 2
    assert done.loss == steps[-1]["loss"]
    picture = (tmp_path / "adapter" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_modules_that_learn_nothing_are_named(
    tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where only the first token is looked back from, it is all that attention can look at."""
    how: dict[str, Any] = {"num_blocks": 4, "max_length": 2, "max_steps": 2, "target_modules": ["q_proj", "v_proj"]}
    train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "a", **how)
    assert "the blocks of 2 of 4 modules are zero still: nothing of the data reached model.layers.0" in caplog.text


def test_completions_are_learned_and_short_lines_left_out(
    tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "diablo_export"):
        train(tiny_model("llama"), folder / "pairs.jsonl", tmp_path / "a", num_blocks=4, max_length=10, epochs=2)
    assert "pairs.jsonl: left out 2 of 6 lines, which have nothing to predict" in caplog.text
    assert (
        "pairs.jsonl: 2 of 6 lines are longer than --max-length and lose their end (the first is line " in caplog.text
    )
    assert [record["step"] for record in log_of(tmp_path / "a")] == [1, 2]


def test_classifier_saves_head_and_labels(tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"task": "text-classification", "num_blocks": 4, "max_length": 16, "lr": 0.01}
    done = train(tiny_model("bert"), folder / "words.jsonl", tmp_path / "words", max_steps=2, **options)
    adapter = Adapter.load(done.output)
    assert adapter.labels == ["cat", "dog", "log"] and adapter.modules_to_save == ["classifier"]
    assert adapter.saved["classifier.weight"].shape == (3, 64) and adapter.task_type == "SEQ_CLS"
    done = train(
        tiny_model("llama"), folder / "labels.jsonl", tmp_path / "decoder", max_steps=30,
        eval_data=folder / "labels.jsonl", eval_every=30, **options,
    )  # fmt: skip
    adapter = Adapter.load(done.output)
    assert adapter.labels == ["0", "1"] and adapter.modules_to_save == ["score"]
    assert done.evaluations[-1]["eval_accuracy"] == 1.0  # two sentences that differ in one word
    tuned, tokenizer = load_tuned(tiny_model("llama"), adapter)
    with torch.no_grad():
        found = [
            int(tuned(torch.tensor([tokenizer(f"the {w} sat")["input_ids"]])).logits.argmax()) for w in ("dog", "cat")
        ]
    assert found == [0, 1]


def test_class_order_follows_a_base_that_knows_the_classes(folder: Path, tmp_path: Path) -> None:
    names = {0: "log", 1: "cat", 2: "dog"}
    base = tiny.make_model("bert", tmp_path / "base", id2label=names, label2id={v: k for k, v in names.items()})
    train(
        base,
        folder / "words.jsonl",
        tmp_path / "a",
        task="text-classification",
        num_blocks=4,
        max_steps=1,
        max_length=8,
    )
    assert Adapter.load(tmp_path / "a").labels == ["log", "cat", "dog"]


@pytest.mark.parametrize(
    ("id2label", "classes"),
    [
        ({"0": "1", "1": "0"}, [1, 0]),  # integers in the data, text in config.json
        ({"0": "a", "1": "b", "10": "c"} | {str(n): f"n{n}" for n in range(2, 10)}, None),  # keys sorted as text
    ],
)
def test_class_order_is_that_of_the_bases_numbers(
    id2label: dict[str, str], classes: list[str | int] | None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model("bert"), tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"id2label": id2label}))
    in_order = classes or [id2label[str(n)] for n in range(len(id2label))]
    examples = [Example(text="the cat", label=name) for name in reversed(in_order)]
    assert known_classes(examples, "data", Checkpoint.open(base), "text-classification") == in_order


def test_a_base_with_other_classes_is_told(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(tiny_model("bert"), tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"id2label": {"0": "good", "1": "bad", "2": "neutral"}}))
    examples = [Example(text="the cat", label=name) for name in ("good", "bad")]
    assert known_classes(examples, "data", Checkpoint.open(base), "text-classification") == ["bad", "good"]
    assert "has the classes good, bad, neutral; the data's are bad, good" in caplog.text


def test_a_head_for_other_classes_is_no_beginning(
    tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"task": "text-classification", "max_steps": 1, "max_length": 8}
    train(tiny_model("bert"), folder / "words.jsonl", tmp_path / "a", num_blocks=4, **how)
    data = tmp_path / "others.jsonl"
    data.write_text("".join(json.dumps({"text": "the cat", "label": name}) + "\n" for name in "xyz"))
    with pytest.raises(AdapterError, match="its head is for the classes cat, dog, log, the data's are x, y, z; give"):
        train(tiny_model("bert"), data, tmp_path / "b", init_adapter=tmp_path / "a", **how)
    done = train(tiny_model("bert"), folder / "words.jsonl", tmp_path / "b", init_adapter=tmp_path / "a", **how)
    assert done.steps == 1


def test_gradient_checkpointing_trains_to_the_same_adapter(
    tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    for on in (False, True):
        train(tiny_model("llama"), folder / "text.jsonl", tmp_path / str(on), gradient_checkpointing=on, **RUN)
    assert same_weights(tmp_path / "False", tmp_path / "True")


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ner"}, "--task is 'ner'; it must be one of causal-lm, text-classification"),
        (
            {"lr": 0.0, "batch_size": 0},
            "(?s)--lr is 0.0; it must be a number above 0.*--batch-size is 0; it must be a whole number, at least 1",
        ),
        ({"lr": math.nan}, "--lr is nan"),
        ({"lr": "1e-3"}, "--lr is '1e-3'; it must be a number above 0"),  # as YAML reads it
        (
            {"lr": None, "max_steps": 2.5},
            "(?s)--lr is None; it must be a number.*--max-steps is 2.5; it must be a whole",
        ),
        ({"lr": 1e300}, r"--lr is 1e\+300; it must be a number above 0, at most 1e30"),  # torch's own end is near 1e38
        ({"seed": np.int64(3)}, r"--seed is np.int64\(3\); it must be a whole number"),  # the first checkpoint is JSON
        ({"eval_fraction": 1.0}, "--eval-fraction is 1.0; it must be a number, at least 0 and below 1"),
        ({"eval_data": "x", "eval_fraction": 0.1}, "both --eval-data and --eval-fraction"),
        ({"dtype": "float16"}, "--dtype is 'float16'; it must be one of auto, float32, bfloat16"),
        ({"schedule": "step"}, "--schedule is 'step'; it must be one of linear, cosine, constant"),
        ({"max_length": 300}, "--max-length is 300, but the model has 256 positions"),
        ({"num_blocks": 64}, "num_blocks is 64, which 4 of 10 target modules cannot be cut into"),
        ({"target_modules": "wq"}, "target module 'wq' matches no linear layer"),
        ({"eval_fraction": 0.9, "max_length": 250}, "leaves nothing to train on"),
    ],
)
def test_bad_options(
    options: dict[str, Any], message: str, tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "a", **{"max_length": 16, **options})
    assert not list(tmp_path.iterdir())


def test_files_where_folders_are_to_lie(tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.training").touch()
    with pytest.raises(OutputError, match=r"a\.training: is a file, where the unfinished run is to lie"):
        train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "a", max_length=16)
    with pytest.raises(InputError, match=r"--tensorboard is .*a\.training, a file; it must be a folder"):
        train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "b", tensorboard=tmp_path / "a.training")
    assert [path.name for path in tmp_path.iterdir()] == ["a.training"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("text.jsonl", {"task": "text-classification"}, "line 1 has no label"),
        ("same.jsonl", {"task": "text-classification"}, "all 2 lines have the label 1"),
        ("one.jsonl", {"task": "text-classification"}, "1 of 2 lines have a label: line 1 has one"),
        ("labels.jsonl", {"task": "text-classification", "eval_data": "other.jsonl"}, "other.jsonl: line 1 has the"),
        ("labels.jsonl", {}, 'has labels, which --task causal-lm does not learn'),
        ("text.jsonl", {"task": "causal-lm", "eval_data": "labels.jsonl"}, "labels.jsonl: has labels, which --task"),
    ],
)  # fmt: skip
def test_bad_data(
    data: str, options: dict[str, Any], message: str, tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    if "eval_data" in options:
        options = {**options, "eval_data": folder / options["eval_data"]}
    with pytest.raises(DataError, match=message):
        train(
            tiny_model("bert" if "text" in options.get("task", "") else "llama"),
            folder / data,
            tmp_path / "a",
            num_blocks=4,
            **options,
        )
    assert not list(tmp_path.iterdir())


def test_positions_that_begin_behind_the_padding_are_not_there_for_text(folder: Path, tmp_path: Path) -> None:
    """RoBERTa's first position is the one after its padding token: of 34 positions, 32 are left."""
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    tiny.make_tokenizer(tmp_path / "m")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"text": TEXT * 9, "label": label}) + "\n" for label in "ab")
    )
    how: dict[str, Any] = {"task": "text-classification", "num_blocks": 4}
    assert train(tmp_path / "m", tmp_path / "data.jsonl", tmp_path / "a", **how).steps == 1
    with pytest.raises(InputError, match="--max-length is 33, but the model has 32 positions; give 32 or less"):
        train(tmp_path / "m", tmp_path / "data.jsonl", tmp_path / "b", max_length=33, **how)


@pytest.mark.parametrize("kind", ["Bert", "XLNet"])
def test_models_that_see_what_they_are_to_predict_are_no_language_models(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    import transformers

    common: dict[str, Any] = {"vocab_size": 320}
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = (
        transformers.BertForMaskedLM(transformers.BertConfig(**common, **sizes, intermediate_size=32))
        if kind == "Bert"
        else transformers.XLNetLMHeadModel(transformers.XLNetConfig(**common, d_model=32, n_layer=1, n_head=2))
    )
    model.save_pretrained(tmp_path / "m")
    tiny.make_tokenizer(tmp_path / "m")
    with pytest.raises(CheckpointError, match="its answer for a token changes with the tokens behind it"):
        train(tmp_path / "m", folder / "text.jsonl", tmp_path / "a", **RUN)


def test_classifiers_at_the_end_token_want_one_in_every_text(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=320, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, num_labels=2,
    )  # fmt: skip
    base, data = tmp_path / "bart", tmp_path / "labels.jsonl"
    BartForSequenceClassification(config).save_pretrained(base)
    tiny.make_tokenizer(base)
    run: dict[str, Any] = {"task": "text-classification", "num_blocks": 4, "max_steps": 1, "batch_size": 2}

    def write(*texts: str) -> None:
        data.write_text("".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(texts)))

    write("the cat", "the dog sat")
    with pytest.raises(DataError, match=r"bart: classifies at the token '</s>', .*line 1 has 0: let its tokenizer add"):
        train(base, data, tmp_path / "a", **run)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save_pretrained(base)
    train(base, data, tmp_path / "a", **run)
    write("the cat", "the </s> dog")
    with pytest.raises(DataError, match="line 2 has 2: take that out of the text"):
        train(base, data, tmp_path / "b", **run)


def test_cuda_asked_for_and_absent(tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"--device is cuda, but torch .* finds no CUDA GPU here; use --device cpu"):
        train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "a", device="cuda")


def test_existing_output_is_kept(tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists already; choose another --output, or give --overwrite"):
        train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "a", **RUN)
    train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "a", overwrite=True, **{**RUN, "max_steps": 1})
    assert Adapter.load(tmp_path / "a").modules and not (tmp_path / "a" / "mine").exists()


def test_divergence_stops_with_a_message(tiny_model: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"at step 2 \(learning rate 1e\+30\), first in the output of model\.layers\.0\..*: training diverged",
    ):
        train(tiny_model("llama"), folder / "text.jsonl", tmp_path / "a", **{**RUN, "lr": 1e30, "schedule": "constant"})
    assert not list(tmp_path.iterdir()), "no checkpoint was written, so nothing is left"
