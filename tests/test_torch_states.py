from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers

from diablo_export.converters.onnx_graph import build_graph
from diablo_export.errors import ExportError
from tests import graphs, tiny

# float32 in another order of additions: a few 1e-6 on logits of about 5, through a handful of layers
CLOSE = 5e-5
KINDS = {
    "lfm2-moe": {"past.0.conv", "past_key_values.1.key", "past_key_values.1.value"},
    "granite-states": {"past.0.conv", "past.0.recurrent", "past_key_values.1.key", "past_key_values.1.value"},
    "falcon-h1": {f"past{kind}" for i in "01" for kind in (f".{i}.conv", f".{i}.recurrent")}
    | {f"past_key_values.{i}.{kind}" for i in "01" for kind in ("key", "value")},
}


@pytest.mark.parametrize("name", KINDS)
def test_states_beside_keys_and_values(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A prompt that is no multiple of the chunks of 4 in which torch computes, then token by token."""
    assert build_graph(tiny_model(name), tmp_path).exporter == "torch"
    session = graphs.open_session(tmp_path)
    assert {value.name for value in session.get_inputs() if value.name.startswith("past")} == KINDS[name]
    wanted = graphs.logits_of(graphs.hugging_face(tiny_model(name)), graphs.IDS)
    np.testing.assert_allclose(graphs.in_steps(session, graphs.IDS, 7), wanted, rtol=0, atol=CLOSE)
    # several tokens behind a state
    first = graphs.run(session, graphs.IDS[:, :5], np.ones((2, 5), np.int64))
    past = {entry: first[entry.replace("past_key_values", "past").replace("past", "present")] for entry in KINDS[name]}
    chunk = graphs.run(session, graphs.IDS[:, 5:], np.ones_like(graphs.IDS), past)["logits"]
    np.testing.assert_allclose(chunk, wanted[:, 5:], rtol=0, atol=CLOSE)


def test_other_recurrent_states_are_refused(tmp_path: Path) -> None:
    sizes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    states = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    config = transformers.Qwen3NextConfig(
        **{key: value for key, value in tiny.SIZES.items() if key != "attn_implementation"},
        **sizes, **states, linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    transformers.Qwen3NextForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer(tmp_path / "model")
    with pytest.raises(ExportError, match=r"its recurrent states are neither those of Mamba 2 nor keys and values"):
        build_graph(tmp_path / "model", tmp_path)
