"""An exported model in plain ONNX Runtime: a whole sequence at once, or token by token through its KV cache.

What a graph wants is read from the graph: onnxruntime-genai's decoders (input_ids, attention_mask,
past_key_values.*), torch's (position_ids too) and encoders (token_type_ids). One sequence at a time; padded batches
are a second thing to test, by `batch`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diablo_export import runtime
from diablo_export.block_storage import BLOCKS_SUFFIX, SCALES_SUFFIX
from diablo_export.blockdiag import Array
from diablo_export.errors import ExportError
from diablo_export.measure.padding import Padded, pad
from diablo_export.measure.prompts import Ids

if TYPE_CHECKING:
    import onnxruntime

# past_key_values.3.key, present.3.key, past.0.conv
CACHE = re.compile(r"^(past|present)\D*(\d+)\.(key|value|conv|recurrent)$")
_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
}


@dataclass(frozen=True)
class OnnxRunner:
    """A session with an adapter on or off.

    Attributes:
        session: the opened model; several runners can share it.
        adapter: an `.onnx_adapter` file, loaded, or None for the base.
        fixed: inputs fed on every run, such as a classification head or blocks.
        cache_shape: (heads, head size) of the KV cache, for graphs that leave them open; see `cache_shape`.
        output: name of the logits; where the graph has none of that name, its only output.
        length: tokens of every sequence, for graphs that take no others: shorter ones are padded at the right. None:
            what the graph says.
    """

    session: onnxruntime.InferenceSession
    adapter: runtime.SwapAdapter | None = None
    fixed: Mapping[str, Array] = field(default_factory=dict)
    cache_shape: tuple[int, int] | None = None
    output: str = "logits"
    length: int | None = None

    def __post_init__(self) -> None:
        """Read from the graph what nobody said."""
        if self.session is None:  # one that was closed
            return
        outputs = [value.name for value in self.session.get_outputs() if not CACHE.match(value.name)]
        if self.output not in outputs and len(outputs) == 1:
            object.__setattr__(self, "output", outputs[0])
        ids = next((value for value in self.session.get_inputs() if value.name == "input_ids"), None)
        if self.length is None and ids is not None and isinstance(ids.shape[-1], int):
            object.__setattr__(self, "length", ids.shape[-1])

    def prefill(self, ids: Ids) -> Array:
        """Logits of a whole sequence (tokens,): (tokens, vocabulary), or (1, labels) of a classifier; float32."""
        if self.length is not None:
            return self.batch([ids], 0)[0]
        return self._call(ids, self.empty_cache())[0]

    def batch(self, rows: Sequence[Ids], token: int, *, left: bool = False) -> list[Array]:
        """Logits of several sequences, padded with `token` and run at once; each as `prefill` gives it."""
        padded = self._pad(rows, token, left=left)
        feeds = {**self._inputs(padded), **self.empty_cache(len(rows)), **self.fixed}
        (logits,) = runtime.run(self.session, feeds, self.adapter, [self.output])
        return padded.unpadded(logits.astype(np.float32))

    def decode(self, prompt: Ids, tokens: Ids) -> Array:
        """Logits that predict each of `tokens` after `prompt`, step by step with the KV cache: (steps, vocabulary)."""
        logits, cache = self._call(prompt, self.empty_cache(), keep=True)
        rows = [logits[-1]]
        for past, token in enumerate(tokens[:-1], start=len(prompt)):
            logits, cache = self._call(np.array([token]), cache, past=past, keep=True)
            rows.append(logits[-1])
        return np.stack(rows)

    def greedy(self, prompt: Ids, steps: int) -> Ids:
        """The `steps` likeliest next tokens, one after the other."""
        return np.array(list(itertools.islice(self.likeliest(prompt), steps)), np.int64)

    def likeliest(self, prompt: Ids) -> Iterator[int]:
        """The likeliest next tokens, one after the other, without end; each is computed when it is asked for."""
        logits, cache = self._call(prompt, self.empty_cache(), keep=True)
        for past in itertools.count(len(prompt)):
            token = int(logits[-1].argmax())
            yield token
            logits, cache = self._call(np.array([token]), cache, past=past, keep=True)

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes and gives a KV cache."""
        return any(CACHE.match(value.name) for value in self.session.get_inputs())

    @property
    def decodes(self) -> bool:
        """Whether it can go on from its cache, token by token."""
        return self.has_cache and self.length is None

    def _call(
        self, ids: Ids, cache: Mapping[str, Array], past: int = 0, keep: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        present = [v.name for v in self.session.get_outputs() if keep and CACHE.match(v.name)]
        feeds = {**self.feeds(ids, past), **cache, **self.fixed}
        logits, *values = runtime.run(self.session, feeds, self.adapter, [self.output, *present])
        flat = logits.astype(np.float32).reshape(-1, logits.shape[-1])  # (1, T, V) → (T, V); (1, labels) stays
        past_names = {cache_key(v.name): v.name for v in self.session.get_inputs() if CACHE.match(v.name)}
        return flat, {past_names[cache_key(name)]: value for name, value in zip(present, values, strict=True)}

    def feeds(self, ids: Ids, past: int) -> dict[str, Array]:
        """Inputs for the tokens `ids` behind `past` others, without the KV cache, the adapter's and `fixed` ones."""
        count = len(ids)
        mask, positions = np.ones((1, past + count), np.int64), np.arange(past, past + count)[None]
        return self._inputs(Padded(np.asarray(ids)[None], mask, positions))

    def padded(self, ids: Ids) -> dict[str, Array]:
        """The same for a graph that takes sequences of one length only: filled up at the right."""
        return self._inputs(self._pad([ids], 0))

    def _pad(self, rows: Sequence[Ids], token: int, *, left: bool = False) -> Padded:
        longest = max(len(row) for row in rows)
        if self.length is not None and longest > self.length:
            raise ExportError(
                f"the model takes sequences of {self.length} tokens, and here are {longest}; "
                "export it with a free length"
            )
        return pad(rows, token, left=left, length=self.length)

    def _inputs(self, padded: Padded) -> dict[str, Array]:
        known: dict[str, Array] = {
            "input_ids": padded.ids,
            "attention_mask": padded.mask,
            "position_ids": padded.positions,
            "token_type_ids": np.zeros_like(padded.ids),
        }
        feeds: dict[str, Array] = {}
        unknown = []
        swapped = self.adapter.names if self.adapter else frozenset[str]()
        for value in self.session.get_inputs():
            if value.name in known:
                fed = known[value.name].astype(_DTYPES[value.type])
                # of text, a position along each axis of a picture is the same
                feeds[value.name] = fed if len(value.shape) == 2 else np.tile(fed, (value.shape[0], 1, 1))
            elif value.name in self.fixed or value.name in swapped:
                continue
            elif value.name.endswith(BLOCKS_SUFFIX):  # required blocks: empty ones are the base
                feeds[value.name] = np.zeros((0, 0, 0), _DTYPES[value.type])
            elif value.name.endswith(SCALES_SUFFIX):
                feeds[value.name] = np.zeros(0, np.float32)
            elif not CACHE.match(value.name):
                unknown.append(value.name)
        if unknown:
            raise ExportError(
                f"the model wants inputs that are not known here: {', '.join(unknown)}; known are {', '.join(known)}, "
                "past_key_values.*.key and .value"
            )
        return feeds

    def empty_cache(self, rows: int = 1) -> dict[str, Array]:
        """A KV cache of no tokens, by input name: (rows, heads, 0, head size) each; {} where the graph takes none."""
        cache: dict[str, Array] = {}
        for value in self.session.get_inputs():
            if not CACHE.match(value.name):
                continue
            if value.type not in _DTYPES:
                raise ExportError(f"{value.name} is a {value.type}; caches of {', '.join(_DTYPES)} can be run here")
            if not value.name.endswith((".key", ".value")):  # the state of a convolution or of linear attention
                cache[value.name] = np.zeros((rows, *value.shape[1:]), _DTYPES[value.type])
                continue
            _, heads, _, size = value.shape  # [batch, heads, past, head size]
            if not isinstance(heads, int) or not isinstance(size, int):
                if self.cache_shape is None:
                    raise ExportError(f"{value.name} has shape {value.shape}, and config.json does not give its sizes")
                heads, size = self.cache_shape
            cache[value.name] = np.zeros((rows, heads, 0, size), _DTYPES[value.type])
        return cache


def cache_shape(folder: Path) -> tuple[int, int] | None:
    """(KV heads, head size) from a folder's genai_config.json or config.json; None where neither says."""
    for name in ("genai_config.json", "config.json"):
        try:
            config: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        config = config.get("model", {}).get("decoder", config) if name == "genai_config.json" else config
        attention = config.get("num_attention_heads") or config.get("n_head")
        hidden = config.get("hidden_size") or config.get("n_embd")
        size = config.get("head_size") or config.get("head_dim") or (hidden // attention if attention and hidden else 0)
        heads = config.get("num_key_value_heads") or attention
        if heads and size:
            return int(heads), int(size)
    return None


def cache_key(name: str) -> str:
    """`3.key` of past_key_values.3.key and of present.3.key."""
    match = CACHE.match(name)
    assert match
    return f"{match[2]}.{match[3]}"
