"""A small language model, trained on the spot on text that every Python installation has.

It learns English prose from Python's own reference manual (`pydoc_data.topics`). Functions of the standard library,
another kind of text altogether, are for an adapter to learn; the base sees a few of them, as any base has seen a
little of everything: the vectors of tokens that it never met would stay noise, and an adapter leaves them as they are.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diablo_export.console import log, progress
from diablo_export.errors import CheckpointError, require

VOCABULARY = 2048
LENGTH = 64  # tokens of a training sequence; many small steps learn more in a minute than few large ones
BATCH = 8  # of which one is code
PEAK_RATE = 5e-3
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CODE_BYTES = 400_000  # of functions, enough for an adapter of this size


def prose() -> list[str]:
    """Paragraphs of Python's reference manual, without its code and tables.

    Raises:
        CheckpointError: this Python was installed without the manual.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CheckpointError(f"the demo learns from pydoc_data, which this Python lacks ({error})") from error
    found: dict[str, None] = {}  # in order, once each
    for topic in topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            text = re.sub(r"\s+", " ", paragraph).strip()
            letters = sum(each.isalpha() or each == " " for each in text)
            whole = len(text) > 80 and text[0].isupper() and text[-1] in ".:"
            if whole and letters > 0.88 * len(text) and "::=" not in text:
                found[text] = None
    return list(found)


@functools.cache
def functions() -> tuple[list[str], list[str]]:
    """Functions of the standard library without docstrings, about CODE_BYTES: to train on, and held out (a tenth)."""
    found: dict[str, None] = {}  # in order, once each
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found |= dict.fromkeys(_functions_of(file))
        if sum(map(len, found)) > CODE_BYTES:
            break
    texts = list(found)
    cut = len(texts) * 9 // 10
    return texts[:cut], texts[cut:]


def _functions_of(file: Path) -> Iterator[str]:
    source = file.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a file of another version, kept for its tests
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            if node.body:
                text = textwrap.dedent(ast.unparse(node))
                if 80 < len(text) < 1000:
                    yield text


def write_data(folder: Path) -> tuple[Path, Path]:
    """train.jsonl and test.jsonl, of functions."""
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, texts in zip(files, functions(), strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return files


def train_model(folder: Path, steps: int, seed: int = 0) -> float:
    """Train the model and its tokenizer from nothing and save them into `folder`; returns the last loss."""
    torch = require("torch", "train")
    transformers = require("transformers", "train")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer([*prose(), *functions()[0]])
    end: int = tokenizer.eos_token_id
    kinds = [
        torch.tensor([token for text in texts for token in (*tokenizer(text)["input_ids"], end)])
        for texts in (prose(), functions()[0][::2])
    ]
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    log.info("base: %s parameters, %s tokens of prose", f"{model.num_parameters():,}", f"{len(kinds[0]):,}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    loss = torch.zeros(())
    model.train()
    with progress("Training a base model", steps) as advance:
        for _ in range(steps):
            batch = torch.cat([_windows(kinds[0], BATCH - 1), _windows(kinds[1], 1)])  # (BATCH, LENGTH)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(loss.detach())


def _windows(tokens: Any, count: int) -> Any:
    """Random runs of LENGTH tokens: (count, LENGTH)."""
    torch = require("torch", "train")
    starts = torch.randint(len(tokens) - LENGTH, (count, 1))
    return tokens[starts + torch.arange(LENGTH)]


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer over `texts`."""
    transformers = require("transformers", "train")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<end>"
    )
