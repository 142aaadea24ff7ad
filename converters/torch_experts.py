"""Mixtures of experts on the torch road: one `MoE` operator of onnxruntime for the experts of a layer.

As transformers computes them they cannot be traced, or every token takes a copy of its experts' weights, which is
gigabytes for a prompt. The operator multiplies each expert's tokens with the weights where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from diablo_export.trainer.experts import is_experts

_NOT_CHOSEN = -1e4  # in the place of a logarithm: its exponential is 0, and float16 holds it
_LEAST = 1e-30  # of a weight, for its logarithm


def use_operator(model: nn.Module) -> None:
    """Make each layer's experts one node of the graph to be traced.

    Raises:
        NotImplementedError: experts of a kind that the operator does not have.
    """
    for module in model.modules():
        if is_experts(module):
            module.forward = partial(_forward, module, _activation(module))


def _forward(
    experts: Any,
    activation: Mapping[str, float],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Hidden states (tokens, hidden) through each token's experts (tokens, k), summed with their weights (tokens, k).

    The operator takes the k largest of its logits and weighs by their softmax: that of logarithms are the weights as
    shares of their sum.
    """
    weights = top_k_weights.float()
    count = experts.down_proj.shape[0]
    nowhere = torch.full((hidden_states.shape[0], count), _NOT_CHOSEN, device=weights.device)
    logits = nowhere.scatter(1, top_k_index, weights.clamp(min=_LEAST).log())  # (tokens, experts)
    biases = [experts.gate_up_proj_bias, experts.down_proj_bias] if experts.has_bias else [None, None]
    inputs = [hidden_states, logits.to(hidden_states.dtype), experts.gate_up_proj, biases[0], experts.down_proj]
    mixed = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        [*inputs, biases[1]],
        {
            "k": top_k_index.shape[1],
            "activation_type": "swiglu",
            "swiglu_fusion": 1,  # the rows of gate and up by turns: the CPU has no other
            "normalize_routing_weights": 1,
            **activation,
        },
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=1,
    )
    mixed = mixed.to(hidden_states.device)
    return mixed * weights.sum(-1, keepdim=True).to(hidden_states.dtype)


def _activation(experts: Any) -> dict[str, float]:
    """The operator's settings that give what the experts' gate gives: found by trying.

    Raises:
        NotImplementedError: none do.
    """
    if not experts.has_gate or experts.has_post_expert_norm:
        raise NotImplementedError("its experts have no gate, or a norm, which onnxruntime's MoE operator has not")
    both = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 10  # past any limit too
    wanted = experts._apply_gate(both)
    gate, up = both.chunk(2, -1) if experts.is_concatenated else (both[..., ::2], both[..., 1::2])
    own = [value for value in vars(experts).values() if isinstance(value, float)]
    for alpha, beta, limit in product((1.0, *own), (0.0, 1.0), (None, *own)):
        g, u = (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
        if torch.allclose(g * torch.sigmoid(alpha * g) * (u + beta), wanted, rtol=1e-5, atol=1e-5):
            more = {} if limit is None else {"swiglu_limit": limit}
            return {"activation_alpha": alpha, "activation_beta": beta, **more}
    raise NotImplementedError("its experts' gate is none that onnxruntime's MoE operator has")
