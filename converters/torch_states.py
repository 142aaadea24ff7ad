"""What a decoder keeps from token to token, as inputs and outputs of a graph: keys, values and states of other kinds.

Short convolutions (LFM2) keep their last inputs, state spaces (Mamba 2) a matrix for each head. transformers computes
these in chunks of a fixed length; here they are onnxruntime's `LinearAttention`, for any length and from any state.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_SCAN = "mamba2_chunk_scan"  # as every model with such states calls it, in a module of its own


def kept(cache: Any) -> dict[str, torch.Tensor]:
    """The tensors of a cache by layer and kind, such as 0.key, 0.value, 1.conv and 1.recurrent."""
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(getattr(cache, "layers", ())):
        states = {
            "key": getattr(layer, "keys", None),
            "value": getattr(layer, "values", None),
            "conv": _only(getattr(layer, "conv_states", {})),
            "recurrent": _only(getattr(layer, "recurrent_states", {})),
        }
        found |= {f"{index}.{kind}": state for kind, state in states.items() if state is not None}
    return found


def cache_of(tensors: Mapping[str, torch.Tensor]) -> DynamicCache:
    """A cache that holds these, named as `kept` names them."""
    cache = DynamicCache()
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, kind = name.partition(".")
        layers.setdefault(int(index), {})[kind] = tensor
    cache.layers = [_layer(layers.get(index, {})) for index in range(max(layers) + 1)]
    return cache


def is_state(name: str) -> bool:
    """Whether it is of one size, however many tokens there were."""
    return name.endswith((".conv", ".recurrent"))


@contextmanager
def scans(model: nn.Module, recurrent: bool) -> Iterator[None]:
    """While it is entered, the model's state spaces are computed by onnxruntime's operator.

    Raises:
        NotImplementedError: it keeps recurrent states of another kind.
    """
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    calling = [module for module in modules if hasattr(module, _SCAN)]
    if recurrent and not calling:
        raise NotImplementedError("its recurrent states are neither those of Mamba 2 nor keys and values")
    before = [getattr(module, _SCAN) for module in calling]
    try:
        for module in calling:
            setattr(module, _SCAN, _scan)
        yield
    finally:
        for module, own in zip(calling, before, strict=True):
            setattr(module, _SCAN, own)


def _only(states: Mapping[int, Any]) -> Any:
    if len(states) > 1:
        raise NotImplementedError("a layer of it keeps several states")
    return states.get(0)


def _layer(tensors: Mapping[str, torch.Tensor]) -> Any:
    if not {"conv", "recurrent"} & set(tensors):
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
    else:
        from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

        layer = LinearAttentionAndFullAttentionLayer() if "key" in tensors else LinearAttentionLayer()
    if "key" in tensors:
        layer.update(tensors["key"], tensors["value"])
    if "conv" in tensors:
        layer.lazy_initialization(conv_states=tensors["conv"])
        layer.conv_states[0] = tensors["conv"].clone()  # it is written to
        layer.has_previous_state[0] = True
    if "recurrent" in tensors:
        layer.lazy_initialization(recurrent_states=tensors["recurrent"])
        layer.recurrent_states[0] = tensors["recurrent"].clone()
    return layer


def _scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803 (as transformers calls it)
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    *,
    D: torch.Tensor,  # noqa: N803
    dt_bias: torch.Tensor,
    initial_states: torch.Tensor,
    dt_limit: tuple[float, float],
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S ← exp(dt·A)·S + B ⊗ dt·x, y = C·S + D·x.

    hidden_states x and y are (batch, tokens, heads, head size), dt (batch, tokens, heads), A and D (heads,), B and C
    (batch, tokens, groups, state size), states (batch, heads, head size, state size).
    """
    batch, tokens, heads, size = hidden_states.shape
    state = B.shape[3]
    x = hidden_states.float()
    step = functional.softplus(dt.float() + dt_bias).clamp(*dt_limit)
    keys, queries = (one.float().repeat_interleave(heads // B.shape[2], dim=2) for one in (B, C))
    output, last = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        [
            queries.reshape(batch, tokens, heads * state),
            keys.reshape(batch, tokens, heads * state),
            (x * step[..., None]).reshape(batch, tokens, heads * size),
            initial_states.float().transpose(2, 3),
            step * A.float(),
        ],
        {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated", "scale": 1.0},
        dtypes=[torch.float32, torch.float32],
        shapes=[(batch, tokens, heads * size), (batch, heads, state, size)],
        version=1,
    )
    output, last = output.to(x.device), last.to(x.device)
    return output.reshape(batch, tokens, heads, size) + D[:, None] * x, last.transpose(2, 3)
