from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diablo_export.adapter import Adapter
from diablo_export.measure.torch_runner import TorchRunner, context_length
from diablo_export.trainer.model import load_base, load_tuned

Get = Callable[[str], Path]
IDS = np.array([5, 17, 254, 3, 90, 41, 7, 200, 11], np.int64)
# one token at a time is another order of float32 sums, on logits of order 10
CLOSE = 5e-5


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tuned(request: pytest.FixtureRequest, tiny_model: Get, tiny_adapter: Get) -> tuple[TorchRunner, Path]:
    name: str = request.param
    model, _ = load_tuned(tiny_model(name), Adapter.load(tiny_adapter(name)))
    return TorchRunner(model), tiny_model(name)


def test_off_is_the_base_bit_for_bit_whatever_ran_before(tuned: tuple[TorchRunner, Path]) -> None:
    on, folder = tuned
    off = TorchRunner(on.model, adapted=False)
    base, _ = load_base(folder, "causal-lm")
    with torch.inference_mode():
        expected = base(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()
    first = on.prefill(IDS)
    np.testing.assert_array_equal(off.prefill(IDS), expected)
    np.testing.assert_array_equal(on.prefill(IDS), first)
    assert np.abs(first - expected).max() > 0.1
    assert first.dtype == np.float32 and first.shape == (len(IDS), 320)


def test_decoding_step_by_step_gives_what_prefill_gives(tuned: tuple[TorchRunner, Path]) -> None:
    runner, _ = tuned
    steps = runner.decode(IDS[:4], IDS[4:])
    # the first row predicts IDS[4], so it comes from position 3
    np.testing.assert_allclose(steps, runner.prefill(IDS[:-1])[3:], atol=CLOSE)


def test_greedy_takes_the_likeliest_token_at_every_step(tuned: tuple[TorchRunner, Path]) -> None:
    runner, _ = tuned
    tokens, logits = runner.greedy(IDS, 5)
    text = IDS
    for step, token in enumerate(tokens):  # the slow way: the whole text again for every token
        whole = runner.prefill(text)[-1]
        np.testing.assert_allclose(logits[step], whole, atol=CLOSE)
        assert whole.argmax() == token
        text = np.append(text, token)
    np.testing.assert_allclose(runner.decode(IDS, tokens), logits, atol=CLOSE)


def test_a_classifier_gives_one_row(tiny_model: Get, tiny_adapter: Get) -> None:
    model, _ = load_tuned(tiny_model("bert"), Adapter.load(tiny_adapter("bert")))
    assert TorchRunner(model).prefill(IDS).shape == (1, 2)


def test_context_length_is_the_config_s(tuned: tuple[TorchRunner, Path]) -> None:
    model = tuned[0].model
    assert context_length(model) == 256
    bare = torch.nn.Linear(1, 1)
    bare.config = object()  # type: ignore[assignment]
    assert context_length(bare) == 512


def test_positions_that_a_text_can_take() -> None:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2
    }  # fmt: skip
    roberta = transformers.RobertaConfig(max_position_embeddings=34, pad_token_id=1, **sizes)
    bert = transformers.BertConfig(max_position_embeddings=34, **sizes)
    lengths = [context_length(transformers.AutoModel.from_config(config)) for config in (roberta, bert)]
    assert lengths == [32, 34], "RoBERTa counts from behind its padding"
