"""The operators of the domain `ai.diablo`, version 1: contract, body in standard ONNX operators, numpy twin.

    Y = BlockDiagMatMul(X, D, Y0)
    Y = BlockDiagMatMulInt8(X, D, S, Y0)

    X   (…, K)                                      the module's input
    D   (num_blocks, block_size_in, block_size_out) the blocks; empty means no adapter
    S   (num_blocks)                                what a stored 1 is worth in each block
    Y0  (…, N)                                      the module's output without adapter
    Y   (…, N)                                      Y0 + X · blockdiag(D · S), exactly Y0 for an empty D

X, Y0 and Y have one float type T (float, float16 or bfloat16). D is T or float16; in BlockDiagMatMulInt8 it is int8
and S float32. num_blocks · block_size_in ≥ K and num_blocks · block_size_out ≥ N: where they are larger, X is taken
as zero-padded at its tail and the result is cropped. S is not looked at where D is empty. A model carries the body as
a function of the same domain and name, so that any ONNX Runtime runs it in every type for which it has a MatMul; a
registered kernel of that name takes the function's place.

    Y = MatMulNBitsBlockDiag(X, B, scales, D, zero_points)      attributes K, N, bits, block_size, accuracy_level

is com.microsoft's MatMulNBits(X, B, scales, zero_points) and BlockDiagMatMul behind it as one node, D of X's type. Its
kernel for CUDA reads codes and blocks in one launch; elsewhere it is the two, one after the other. Two and three of
these that read the same X, in one launch as well, are MatMulNBitsBlockDiagPair and MatMulNBitsBlockDiagTriple:

    Y, Y2, … = MatMulNBitsBlockDiagPair(X, B, scales, D, B2, scales2, D2, …, zero_points, zero_points2, …)

with the outputs' sizes in N, N2, … and the other attributes shared; zero points are there for all layers or for none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx.reference.op_run import OpRun

from diablo_export.block_storage import BLOCKS_SUFFIX as BLOCKS_SUFFIX
from diablo_export.block_storage import SCALES_SUFFIX as SCALES_SUFFIX
from diablo_export.block_storage import from_int8
from diablo_export.blockdiag import Array, apply

DOMAIN = "ai.diablo"
NAME = "BlockDiagMatMul"
NAME_INT8 = "BlockDiagMatMulInt8"
NAME_FUSED = "MatMulNBitsBlockDiag"
NAMES_FUSED = {1: NAME_FUSED, 2: f"{NAME_FUSED}Pair", 3: f"{NAME_FUSED}Triple"}  # by how many layers
VERSION = 1
INPUTS = ("X", "D", "Y0")
INPUTS_INT8 = ("X", "D", "S", "Y0")
OUTPUTS = ("Y",)
TYPES = ("float", "float16", "bfloat16")  # what T may be
MIN_OPSET = 15  # of the standard operators in the body: Shape has `start` and `end` since 15
MIN_IR_VERSION = 8  # the first with functions in a model

# An empty D is a branch of its own, not a multiplication by nothing: onnxruntime fuses Transpose and MatMul into one
# kernel, which leaves its output uninitialised where the inner size is 0 and divides by zero where X has no rows.
# Padding and cropping by nothing are two copies, at most 2 % of a layer of 1024 × 1024; a second If to skip them
# costs more than that on one token.
# Shape, not Size: of float16 onnxruntime has none on a CPU, casts all blocks for it, and up to 1.29 crashed on that.
# Blocks of X's own type go through CastLike at no cost: onnxruntime takes it out of the graph.
_BODY = """
<domain: "ai.diablo", opset_import: ["" : {opset}]>
{name} ({inputs}) => (Y)
{{
  x_sizes = Shape (X)
  d_sizes = Shape (D)
  sizes = Concat <axis: int = 0> (x_sizes, d_sizes)
  work = ReduceProd <keepdims: int = 0> (sizes)
  no_work = Constant <value_int: int = 0> ()
  nothing_to_do = Equal (work, no_work)
  Y = If (nothing_to_do) <
    then_branch = without_adapter () => (kept) {{
      kept = Identity (Y0)
    }},
    else_branch = with_adapter () => (tuned) {{
      zero = Constant <value_ints: ints = [0]> ()
      one = Constant <value_ints: ints = [1]> ()
      any = Constant <value_ints: ints = [-1]> ()
      no_pads = Constant <value_ints: ints = [0, 0, 0]> ()
      K = Shape <start: int = -1> (X)
      N = Shape <start: int = -1> (Y0)
      y_shape = Shape (Y0)
      num_blocks = Shape <start: int = 0, end: int = 1> (D)
      size_in = Shape <start: int = 1, end: int = 2> (D)
      size_out = Shape <start: int = 2, end: int = 3> (D)
      padded_in = Mul (num_blocks, size_in)
      padded_out = Mul (num_blocks, size_out)
      missing = Sub (padded_in, K)
      pads = Concat <axis: int = 0> (no_pads, missing)
      x_rows_shape = Concat <axis: int = 0> (any, K)
      x_rows = Reshape (X, x_rows_shape)
      x_padded = Pad (x_rows, pads)
      x_shape = Concat <axis: int = 0> (any, num_blocks, size_in)
      x = Reshape (x_padded, x_shape)
      x_by_block = Transpose <perm: ints = [1, 0, 2]> (x)
      {blocks}
      y_by_block = MatMul (x_by_block, blocks)
      y = Transpose <perm: ints = [1, 0, 2]> (y_by_block)
      y_rows_shape = Concat <axis: int = 0> (any, padded_out)
      y_padded = Reshape (y, y_rows_shape)
      y_rows = Slice (y_padded, zero, N, one)
      delta = Reshape (y_rows, y_shape)
      tuned = Add (Y0, delta)
    }}
  >
}}
"""


# metadata of nodes that this program's exporters made
MODULE = "diablo.module"  # the Hugging Face module path(s) that the node computes
ROWS = "diablo.rows"  # which output rows of that module, where several nodes share it

_BLOCKS = {
    NAME: "blocks = CastLike (D, X)",
    NAME_INT8: "wide = DequantizeLinear <axis: int = 0> (D, S)\n      blocks = CastLike (wide, X)",
}


def function(opset: int = 18, name: str = NAME) -> onnx.FunctionProto:
    """An operator as a model-local function over the standard operators of `opset`, but at least MIN_OPSET."""
    inputs = ", ".join(INPUTS_INT8 if name == NAME_INT8 else INPUTS)
    text = _BODY.format(opset=max(opset, MIN_OPSET), name=name, inputs=inputs, blocks=_BLOCKS[name])
    return onnx.parser.parse_function(text)


def fused_inputs(layers: int = 1, zero_points: bool = False) -> list[str]:
    """Names of the inputs of a node of so many layers; without zero points each of them is 8."""
    each = [f"{name}{nth}" for nth in _nth(layers) for name in ("B", "scales", "D")]
    return ["X", *each, *(f"zero_points{nth}" for nth in _nth(layers) if zero_points)]


def fused_attributes(layers: int = 1) -> list[str]:
    """Names of its attributes, MatMulNBits' own: an N for each layer, the others for all."""
    return ["K", *(f"N{nth}" for nth in _nth(layers)), "bits", "block_size", "accuracy_level"]


def _nth(layers: int) -> list[str]:
    return ["", "2", "3"][:layers]


_FUSED_BODY = """
<domain: "ai.diablo", opset_import: ["" : {opset}, "com.microsoft" : 1, "ai.diablo" : {version}]>
{name} <{attributes}> ({inputs}) => ({outputs})
{{
{layers}
}}
"""

_FUSED_LAYER = """
  Y0_{nth} = com.microsoft.MatMulNBits <K: int = @K, N: int = @N{nth}, bits: int = @bits, block_size: int = @block_size,
                                        accuracy_level: int = @accuracy_level> (X, B{nth}, scales{nth}{zeros})
  Y{nth} = ai.diablo.BlockDiagMatMul (X, D{nth}, Y0_{nth})
"""


def fused_function(opset: int = 18, zero_points: bool = False, layers: int = 1) -> onnx.FunctionProto:
    """The operator of so many layers as a function over com.microsoft's MatMulNBits and BlockDiagMatMul, whose own must
    be there.

    A function cannot leave an input out of a call that it makes, so a model's nodes have zero points all or none.
    """
    body = (
        _FUSED_LAYER.format(nth=nth, zeros=f", zero_points{nth}" if zero_points else "").strip("\n")
        for nth in _nth(layers)
    )
    text = _FUSED_BODY.format(
        opset=max(opset, MIN_OPSET),
        version=VERSION,
        name=NAMES_FUSED[layers],
        attributes=", ".join(fused_attributes(layers)),
        inputs=", ".join(fused_inputs(layers, zero_points)),
        outputs=", ".join(f"Y{nth}" for nth in _nth(layers)),
        layers="\n".join(body),
    )
    return onnx.parser.parse_function(text)


def input_name(module: str) -> str:
    """The graph input that feeds the blocks of this module."""
    return f"{module}{BLOCKS_SUFFIX}"


def scales_name(module: str) -> str:
    """The graph input that feeds the scales of this module's blocks, where they are int8."""
    return f"{module}{SCALES_SUFFIX}"


class BlockDiagMatMul(OpRun):
    """The numpy twin, for `onnx.reference.ReferenceEvaluator(model, new_ops=[BlockDiagMatMul])`."""

    op_domain = DOMAIN

    def _run(self, X: Array, D: Array, Y0: Array, **_: Any) -> tuple[Array]:  # noqa: N803
        return (np.asarray(apply(X, D.astype(X.dtype, copy=False), Y0.shape[-1], Y0)),)


class BlockDiagMatMulInt8(OpRun):
    """The numpy twin of the operator with int8 blocks, used the same way."""

    op_domain = DOMAIN

    def _run(self, X: Array, D: Array, S: Array, Y0: Array, **_: Any) -> tuple[Array]:  # noqa: N803
        blocks = from_int8(D, S) if D.size else np.zeros((0, 0, 0), X.dtype)
        return (np.asarray(apply(X, blocks.astype(X.dtype, copy=False), Y0.shape[-1], Y0)),)
