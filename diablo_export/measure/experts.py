"""The experts that an export holds in few bits: held against those of its twin in torch, or given to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from torch import nn

from diablo_export.measure.coded import Coded
from diablo_export.measure.places import Graph
from diablo_export.measure.stored import Audit, rms_of, steps_of
from diablo_export.quantization import Float32, Quantized, dequantize
from diablo_export.trainer.experts import WEIGHTS, is_experts, set_rounded, weight_of

# inputs of QMoE for each of WEIGHTS: codes, scales, zero points
_INPUTS = {WEIGHTS[0]: (2, 3, 11), WEIGHTS[1]: (5, 6, 12)}


def audit_experts(graph: Graph, node: onnx.NodeProto, experts: nn.Module) -> Audit:
    """How far the worst group that a node stores is from the experts of the base, in steps."""
    worst = 0.0
    for name, grid, rounded in _weights(graph, node):
        for expert in range(len(experts.get_parameter(name))):
            wanted = weight_of(experts, name, expert)
            steps = steps_of(wanted, grid)
            steps = np.maximum(steps, 1e-3 * steps.mean() + 1e-30)  # an empty group has no grid of its own
            worst = float(np.maximum(worst, (rms_of(rounded(expert) - wanted, grid.size) / steps).max()))
    return Audit(worst, 0.0, None, float("nan"))


def lay_experts(graph: Graph, part: nn.Module, path: str) -> None:
    """Give the experts of a part of a network, which lies at `path` of it, the values that the graph has of them."""
    for module, experts in part.named_modules(prefix=path):
        if is_experts(experts) and module in graph.experts:
            for name, _, rounded in _weights(graph, graph.experts[module]):
                set_rounded(experts, name, rounded)


def _weights(graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, Coded, Callable[[int], Float32]]]:
    """Of each of WEIGHTS its name, its grid, and what gives the values of one expert."""
    attributes = {entry.name: entry.i for entry in node.attribute}
    bits, size = attributes["expert_weight_bits"], attributes["block_size"]
    for name, places in _INPUTS.items():
        given = [node.input[place] if place < len(node.input) else "" for place in places]
        codes, scales, zeros = (graph.read(each) if each else None for each in given)

        def values(expert: int, codes: Any = codes, scales: Any = scales, zeros: Any = zeros) -> Float32:
            groups = codes[expert].reshape(*scales[expert].shape, -1)
            points = None if zeros is None else zeros[expert]
            width = codes.shape[2] * 8 // bits
            return dequantize(Quantized(groups, scales[expert].astype(np.float32), points, bits, size, width))

        yield name, Coded(graph, node, bits, size, zeros is not None), values
