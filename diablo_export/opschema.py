"""The operator `ai.diablo::BlockDiagMatMul` version 1: contract, body in standard ONNX operators, numpy twin.

    Y = BlockDiagMatMul(X, D, Y0)

    X   (…, K)                                      the module's input
    D   (num_blocks, block_size_in, block_size_out) the blocks; empty means no adapter
    Y0  (…, N)                                      the module's output without adapter
    Y   (…, N)                                      Y0 + X · blockdiag(D), exactly Y0 for an empty D

One float type T (float, float16 or bfloat16) for all four. num_blocks · block_size_in ≥ K and
num_blocks · block_size_out ≥ N: where they are larger, X is taken as zero-padded at its tail and the result is
cropped. A model carries the body as a function of the same domain and name, so that any ONNX Runtime runs it in every
type for which it has a MatMul; a registered kernel of that name takes the function's place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx.reference.op_run import OpRun

from diablo_export.blockdiag import Array, apply

DOMAIN = "ai.diablo"
NAME = "BlockDiagMatMul"
VERSION = 1
INPUTS = ("X", "D", "Y0")
OUTPUTS = ("Y",)
TYPES = ("float", "float16", "bfloat16")  # what T may be
MIN_OPSET = 15  # of the standard operators in the body: Shape has `start` and `end` since 15
MIN_IR_VERSION = 8  # the first with functions in a model
BLOCKS_SUFFIX = ".diablo_blocks"  # of the graph input that feeds a module's D

# An empty D is a branch of its own, not a multiplication by nothing: onnxruntime fuses Transpose and MatMul into one
# kernel, which leaves its output uninitialised where the inner size is 0 and divides by zero where X has no rows.
# Padding and cropping by nothing are two copies, at most 2 % of a layer of 1024 × 1024; a second If to skip them
# costs more than that on one token.
_BODY = """
<domain: "ai.diablo", opset_import: ["" : {opset}]>
BlockDiagMatMul (X, D, Y0) => (Y)
{{
  x_size = Size (X)
  d_size = Size (D)
  work = Mul (x_size, d_size)
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
      y_by_block = MatMul (x_by_block, D)
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


def function(opset: int = 18) -> onnx.FunctionProto:
    """The operator as a model-local function over the standard operators of `opset`, but at least MIN_OPSET."""
    return onnx.parser.parse_function(_BODY.format(opset=max(opset, MIN_OPSET)))


def input_name(module: str) -> str:
    """The graph input that feeds the blocks of this module."""
    return f"{module}{BLOCKS_SUFFIX}"


class BlockDiagMatMul(OpRun):
    """The numpy twin, for `onnx.reference.ReferenceEvaluator(model, new_ops=[BlockDiagMatMul])`."""

    op_domain = DOMAIN

    def _run(self, X: Array, D: Array, Y0: Array, **_: Any) -> tuple[Array]:  # noqa: N803
        return (np.asarray(apply(X, D, Y0.shape[-1], Y0)),)
