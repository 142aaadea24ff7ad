"""Mixtures of experts in few bits: onnxruntime's `MoE` becomes `QMoE`, each weight rounded to the nearest.

`MoE` has the experts' weights as (experts, out_features, in_features), gate and up by turns; `QMoE` has for each expert
what MatMulNBits has of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from diablo_export.blockdiag import Array
from diablo_export.console import log
from diablo_export.converters.onnx_weights import Job, Piece, Source, placeholder
from diablo_export.quantization import fitting_group, quantize

_WEIGHTS = (2, 4)  # inputs of MoE: gate and up, down
# of QMoE: codes, scales and zero points of each
_CODES, _SCALES, _ZEROS = (2, 5), (3, 6), (11, 12)
_BIASES = ((3, 4), (5, 7))  # from and to
_INPUTS = 13


@dataclass(frozen=True)
class _Kind:
    bits: int
    group_size: int
    symmetric: bool


def quantize_experts(
    graph: ir.Graph,
    node: ir.Node,
    module: str,
    sources: Mapping[ir.Value, Source],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    accuracy_level: int,
) -> list[Job]:
    """Turn a MoE node into QMoE; the jobs that write its weights. None where no group size divides them: they stay.

    Args:
        graph: that has the node.
        node: MoE.
        module: the experts that it is.
        sources: the values of its inputs.
        bits, group_size, symmetric, accuracy_level: as `onnx_graph.build_graph`'s; groups are made smaller where they
            do not divide the experts' sizes, which the operator wants.
    """
    weights = [value for index in _WEIGHTS if (value := node.inputs[index]) is not None]
    widths = [sources[weight].shape[2] for weight in weights]
    size = fitting_group(group_size, widths)
    if size is None:
        floats = sum(int(np.prod(sources[weight].shape)) for weight in weights)
        log.warning(
            "the experts of %s stay float, %.1f MB: no group divides their %s inputs", module,
            floats * 4 / 1e6, " and ".join(map(str, widths)),
        )  # fmt: skip
        return []
    kind = _Kind(bits, size, symmetric)
    made = [_initializers(graph, weight, sources[weight], kind) for weight in weights]
    inputs: list[ir.Value | None] = [*node.inputs[:2], *[None] * (_INPUTS - 2)]
    for place, (codes, scales, *zeros) in enumerate(made):
        inputs[_CODES[place]], inputs[_SCALES[place]] = codes, scales
        inputs[_ZEROS[place]] = zeros[0] if zeros else None
    for old, new in _BIASES:
        inputs[new] = node.inputs[old] if old < len(node.inputs) else None
    node.resize_inputs(_INPUTS if not symmetric else _INPUTS - 2)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, inputs[index])
    node.op_type, node.name = "QMoE", f"{node.name}_Q{bits}"
    for name, number in {
        "expert_weight_bits": bits,
        "block_size": size,
        "accuracy_level": accuracy_level,
        "weights_prepacked": 0,
    }.items():
        node.attributes.add(ir.AttrInt64(name, number))
    for weight in weights:
        del graph.initializers[str(weight.name)]
    return [_job(values, sources[weight], kind) for weight, values in zip(weights, made, strict=True)]


def _initializers(graph: ir.Graph, weight: ir.Value, source: Source, kind: _Kind) -> tuple[ir.Value, ...]:
    count, rows, width = source.shape
    groups, name = width // kind.group_size, weight.name
    codes = placeholder(graph, f"{name}_Q{kind.bits}", ir.DataType.UINT8, (count, rows, width * kind.bits // 8))
    scales = placeholder(graph, f"{name}_scales", weight.dtype, (count, rows, groups))
    if kind.symmetric:
        return codes, scales
    points = (count, rows, -(-groups * kind.bits // 8))
    return codes, scales, placeholder(graph, f"{name}_zero_points", ir.DataType.UINT8, points)


def _job(initializers: tuple[ir.Value, ...], source: Source, kind: _Kind) -> Job:
    dtype = initializers[1].dtype
    assert dtype is not None

    def quantized(expert: int) -> tuple[Array, ...]:
        weight = source.read(expert, expert + 1)[0].astype(np.float32)
        made = quantize(weight, kind.bits, kind.group_size, symmetric=kind.symmetric)
        codes = made.codes.reshape(1, len(weight), -1)
        parts: tuple[Array, ...] = (codes, made.scales[None].astype(dtype.numpy(), copy=False))
        return parts if made.zero_points is None else (*parts, made.zero_points[None])

    def pieces() -> Iterator[Piece]:
        for expert in range(source.shape[0]):
            yield lambda expert=expert: quantized(expert)  # type: ignore[misc]

    return Job(initializers, pieces)
