"""PEFT's own tests, run for DiabloConfig: python examples/benchmarks/peft_suite.py PEFT_CHECKOUT [pytest arguments]

Copies the checkout's tests, puts DiabloConfig where they list the configs of PEFT's methods, lets it into the tests of
mixed batches and of Conv1D layers, and makes small random models under the names of the Hub models that they load.
Needs what the tests import: pytest, datasets, diffusers, parameterized, scipy. The checkout should be of the
installed PEFT.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

IDS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **IDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
BERT = {
    "vocab_size": 320, "pad_token_id": 0, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
GPT = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {
    **IDS, "hidden_size": 16, "ffn_dim": 64, "word_embed_proj_dim": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
T5 = {
    "vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BART = {
    **IDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 128,
}  # fmt: skip
INTERNAL, RANDOM = "peft-internal-testing", "peft-internal-testing/tiny-random"
# Hub name → class, config class, sizes
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{RANDOM}-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    f"{RANDOM}-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    f"{RANDOM}-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    f"{INTERNAL}/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM":
        ("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8}),
    f"{RANDOM}-BertModel": ("BertModel", "BertConfig", BERT),
    f"{RANDOM}-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    f"{RANDOM}-DebertaModel": ("DebertaModel", "DebertaConfig", BERT),
    f"{RANDOM}-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", BERT),
    f"{RANDOM}-BertForSequenceClassification": ("BertForSequenceClassification", "BertConfig", BERT),
    f"{RANDOM}-RobertaForSequenceClassification": ("RobertaForSequenceClassification", "RobertaConfig", BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2":
        ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    f"{RANDOM}-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", "T5Config", T5),
    f"{RANDOM}-BartForConditionalGeneration": ("BartForConditionalGeneration", "BartConfig", BART),
}  # fmt: skip

IMPORT = "from diablo_export.peft import DiabloConfig\n"
CUSTOM = """
_ONE = {"num_blocks": 2, "target_modules": ["lin0"]}
TEST_CASES = [
    ("DiaBlo 1", "MLP", DiabloConfig, {"num_blocks": 2, "target_modules": "lin0"}),
    ("DiaBlo 2", "MLP", DiabloConfig, _ONE),
    ("DiaBlo 3", "MLP", DiabloConfig, {"num_blocks": 2, "target_modules": ["lin1"]}),
    ("DiaBlo 4", "MLP", DiabloConfig, {"num_blocks": 2, "target_modules": ["lin0", "lin1"]}),
    ("DiaBlo 5", "MLP", DiabloConfig, {**_ONE, "modules_to_save": ["lin1"]}),
    ("DiaBlo Conv1D", "EmbConv1D", DiabloConfig, {"num_blocks": 1, "target_modules": ["conv1d"]}),
]
_TWO = {**_ONE, "init_weights": False}
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    ("DiaBlo Same", "diablo", DiabloConfig, _TWO, _TWO),
    ("DiaBlo Different", "diablo", DiabloConfig, _TWO, {**_TWO, "target_modules": ["lin1"]}),
]
"""
# test file → its class, the task of its models
FILES = {
    "test_decoder_models": ("TestDecoderModels", "CAUSAL_LM"),
    "test_feature_extraction_models": ("TestPeftFeatureExtractionModel", "FEATURE_EXTRACTION"),
    "test_seq_classifier": ("TestSequenceClassificationModels", "SEQ_CLS"),
    "test_encoder_decoder_models": ("TestEncoderDecoderModels", "SEQ_2_SEQ_LM"),
    "test_custom_models": ("TestPeftCustomModel", ""),
}


def copy_tests(checkout: Path, folder: Path) -> None:
    """Copy the tests and put DiabloConfig in."""
    shutil.copytree(checkout / "tests", folder / "tests")
    for name, (first, task) in FILES.items():
        file = folder / "tests" / f"{name}.py"
        config = f'{{"task_type": "{task}", "num_blocks": 4, "target_modules": None}}'
        cases = f"ALL_CONFIGS = [(DiabloConfig, {config})]\n" if task else CUSTOM
        text = allow(file.read_text(encoding="utf-8"))
        assert text.count(f"\nclass {first}(") == 1, f"{file}: another PEFT than this script knows"
        file.write_text(text.replace(f"\nclass {first}(", f"\n{IMPORT}{cases}\n\nclass {first}("), encoding="utf-8")
    common = folder / "tests" / "testing_common.py"
    common.write_text(IMPORT + allow(common.read_text(encoding="utf-8")), encoding="utf-8")


def allow(text: str) -> str:
    """Let DiabloConfig into what only some methods are tested for: mixed batches and Conv1D."""
    for names in ("(LoraConfig, RoadConfig)", "(LoraConfig,)", "(IA3Config, LoHaConfig, LoKrConfig, LoraConfig)"):
        text = text.replace(f"not in {names}:", f"not in {names[:-1].rstrip(',')}, DiabloConfig):")
    return text.replace(
        'if config_cls != LoraConfig:\n            pytest.skip("Mixed',
        'if config_cls not in (LoraConfig, DiabloConfig):\n            pytest.skip("Mixed',
    )


def make_model(name: str, folder: Path) -> None:
    """A random model and a tokenizer in folder/name."""
    kind, config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # large enough that outputs differ
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder / name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 4, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / name)


def main() -> int:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy_tests(Path(sys.argv[1]), folder)
        for name in MODELS:
            make_model(name, folder / "hub")
        files = [str(folder / "tests" / f"{name}.py") for name in FILES]
        options = ["-c", os.devnull, "--rootdir", made, "-p", "no:cacheprovider", "-q", "-rfs", "--tb=line"]
        # the models are found as folders, relative to where the tests run
        command = [sys.executable, "-m", "pytest", *options, "-k", "Diablo or DiaBlo", *files, *sys.argv[2:]]
        return subprocess.run(command, cwd=folder / "hub", env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
