"""Models for EleutherAI's lm-evaluation-harness: an export as onnxruntime runs it, and what it was made from.

    import lm_eval
    from diablo_export.measure.harness import language_model

    lm_eval.simple_evaluate(language_model("branch"), tasks=["gsm8k"])

The harness has ONNX classes of its own, for the model builder's folders. They feed zeros to inputs that they do not
know, and a branch's adapter is one: they would evaluate its base, and not say so.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.checkpoint import text_settings
from diablo_export.errors import InputError, require
from diablo_export.manifest import read_manifest
from diablo_export.measure.exported import states
from diablo_export.measure.onnx_runner import OnnxRunner, cache_shape
from diablo_export.measure.sources import is_branch, is_onnx
from diablo_export.trainer.model import load_base, load_tuned
from diablo_export.trainer.options import choose_device

require("lm_eval", "eval")

from lm_eval import utils  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

_LENGTH, _NEW_TOKENS = 2048, 256  # where neither model nor task says, as the harness has it


def language_model(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    name: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = 1,
) -> TemplateLM:
    """What the harness is to evaluate.

    Args:
        path: output folder of `export` or `merge` (ONNX), or a Hugging Face folder or id: a base, or merged.
        adapter: adapter folder to put on a Hugging Face base: the tuned model in torch.
        name: which adapter of a branch export, or `base` for none; None: its first.
        dtype: of torch: `float32`, `bfloat16`, or `stored`, as the checkpoint holds it.
        device: of torch: `auto`, `cpu` or `cuda`.
        batch_size: of torch; onnxruntime takes one sequence at a time.

    Raises:
        InputError: no model, or no such adapter.
    """
    if adapter is None and is_onnx(Path(path)):
        return OnnxLM(Path(path), name)
    place = choose_device(device)
    if adapter is None:
        network, tokenizer = load_base(path, "causal-lm", dtype=dtype, device=place)
    else:
        network, tokenizer = load_tuned(path, Adapter.load(adapter), dtype=dtype, device=place)
    return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch_size)


class OnnxLM(TemplateLM):  # type: ignore[misc]
    """A decoder that `export` or `merge` wrote, in plain ONNX Runtime.

    Attributes:
        runner: the session, with its adapter on.
        tokenizer: of the folder.
        max_length: positions that the model takes; longer contexts lose their beginning.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        from transformers import AutoTokenizer

        super().__init__()
        self.runner = _open(folder, name)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        config = text_settings(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        self.max_length = int(config.get("max_position_embeddings") or config.get("n_positions") or _LENGTH)

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """How the harness tells its caches apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with what the tokenizer puts around a text unless told otherwise."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(token) for token in self.tokenizer(string, verbose=False, **special)["input_ids"]]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows that overlap no further than they must."""
        found = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for key, context, continuation in requests:
            ids = (context + continuation)[-self.max_length - 1 :]
            logits = self.runner.prefill(np.array(ids[:-1]))[-len(continuation) :]  # (continuation, vocabulary)
            logits -= logits.max(-1, keepdims=True)
            rows = logits[np.arange(len(continuation)), continuation] - np.log(np.exp(logits).sum(-1, dtype=np.float64))
            found.append((float(rows.sum()), bool((logits.argmax(-1) == continuation).all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each context, up to one of its stop texts."""
        if not self.runner.has_cache:
            raise InputError("this graph takes no KV cache, so it cannot write: give a folder of a decoder's export")
        found = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1) > 0:
                raise InputError("the task samples its answers; exports are decoded greedily: set do_sample=False")
            stops = options.get("until") or []
            most = int(options.get("max_gen_toks") or _NEW_TOKENS)
            found.append(self._complete(context, [stops] if isinstance(stops, str) else stops, most))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _complete(self, context: str, stops: Sequence[str], most: int) -> str:
        most = min(most, self.max_length - 1)
        ids = self.tok_encode(context)
        if ids[-1:] == [self.eot_token_id]:
            ids.pop()  # some tokenizers end every text; the context is not the end
        answer: list[int] = []
        text = ""
        for token in itertools.islice(self.runner.likeliest(np.array(ids[-(self.max_length - most) :])), most):
            if token == self.eot_token_id:
                break
            answer.append(token)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)


def _open(folder: Path, name: str | None) -> OnnxRunner:
    """An output folder's session: a merge as it is, a branch with one of its adapters, or with none."""
    manifest, shape = read_manifest(folder), cache_shape(folder)
    session = runtime.session(folder / "model.onnx")
    if not is_branch(manifest):
        return OnnxRunner(session, cache_shape=shape)
    known = [str(entry["name"]) for entry in manifest["adapters"]]
    if name not in (None, "base", *known):
        raise InputError(f"{folder}: has no adapter {name!r}; it has {', '.join(known)}, and base for none")
    on, off, _ = states(manifest, session, folder, known[0] if name in (None, "base") else name, shape)
    return off if name == "base" else on
