"""Insert the blocks of adapted modules into an ONNX graph as branches that can be fed.

Each module gets one `ai.diablo::BlockDiagMatMul(x, D, y)` between its output and whoever reads it, or, for int8
blocks, one `ai.diablo::BlockDiagMatMulInt8(x, D, S, y)`. D is a graph input with an initializer of the same name,
empty by default, so that the graph as it stands is the base; S is another. Where one
node is several modules the branches stand behind the Split that follows it, or behind one of their own; where a
module is several nodes their outputs are joined for the branch and split again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from diablo_export import opschema
from diablo_export.converters.onnx_linears import Linear, attribute
from diablo_export.converters.onnx_match import Match
from diablo_export.errors import ExportError
from diablo_export.opschema import MODULE

BLOCK_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}
_TAKE_A_BIAS = ("Gelu", "FastGelu", "Div", "Erf")  # the last two begin a Gelu written out


def add_branches(
    model: ir.Model, matches: Mapping[str, Match], block_dtype: str | None = None
) -> dict[str, ir.DataType]:
    """Give every matched module its branch, and the model the operator's function; returns the inputs to feed.

    Args:
        model: the graph, changed in place.
        matches: by module.
        block_dtype: what the blocks are stored in: fp32, fp16 or int8; None: each layer's own type.

    Raises:
        ExportError: the graph has such branches already, or blocks in fp32 are asked for beside layers in fewer bits.
    """
    if any(node.domain == opschema.DOMAIN for node in model.graph):
        raise ExportError("the graph holds DiaBlo branches already; give the model without them")
    if any(piece.linear.y.shape is None for match in matches.values() for piece in match.pieces):
        ShapeInferencePass()(model)  # onnxruntime loses track of sizes behind a branch of unknown shape
    fed: dict[str, ir.DataType] = {}
    for match in matches.values():
        fed |= _inputs(match, block_dtype)
    shared: dict[int, list[Match]] = {}  # modules by the node that they are rows of
    for match in matches.values():
        if match.pieces[0].whole and len(match.pieces) == 1:
            for linear in (match.pieces[0].linear, *match.again):
                _branch(model, match, linear.x, output(linear), fed)
        elif match.again:
            others = ", ".join(linear.name for linear in match.again)
            raise ExportError(f"{match.module.name} is computed again by {others}, in parts or beside others: merge it")
        elif len(match.pieces) > 1:
            _branch_over_parts(model, match, fed)
        else:
            shared.setdefault(id(match.pieces[0].linear.node), []).append(match)
    for group in shared.values():
        _branches_of_fused(model, group, fed)
    opset = model.opset_imports.get("", opschema.MIN_OPSET)
    put_function(model, opschema.function(opset, opschema.NAME_INT8 if block_dtype == "int8" else opschema.NAME))
    model.opset_imports[opschema.DOMAIN] = opschema.VERSION
    model.graph.sort()  # what joins the parts of a module may stand behind nodes that now read it
    model.ir_version = max(model.ir_version, opschema.MIN_IR_VERSION)
    return fed


def put_function(model: ir.Model, body: onnx.FunctionProto) -> None:
    """Give a model the function of an operator."""
    function = ir.from_proto(body)
    assert isinstance(function, ir.Function)
    model.functions[function.identifier()] = function


def _inputs(match: Match, block_dtype: str | None) -> dict[str, ir.DataType]:
    """The inputs of a module's blocks, and of their scales where they are int8, in the order of the operator's."""
    name, own = match.module.name, match.pieces[0].linear.dtype
    dtype = BLOCK_DTYPES[block_dtype] if block_dtype else own
    if dtype == ir.DataType.FLOAT and own != dtype:
        raise ExportError(
            f"blocks in fp32, but the graph computes {name} in {own.name.lower()}; leave out --block-dtype, or give "
            "fp16 or int8"
        )
    blocks = {opschema.input_name(name): dtype}
    return blocks | ({opschema.scales_name(name): ir.DataType.FLOAT} if dtype == ir.DataType.INT8 else {})


def output(linear: Linear) -> ir.Value:
    """Where a branch joins: the node's output, or for MatMulNBits that of the bias behind it.

    The place decides what onnxruntime can still fuse, and the base must fuse as it does without branches to stay the
    same bit for bit: it pulls a bias into MatMulNBits, unless a Gelu or a LayerNormalization takes it first.
    """
    bias = _only_reader(linear.y)
    if linear.layout != "MatMulNBits" or bias is None or bias.op_type != "Add":
        return linear.y
    vectors = [v.const_value.shape.numpy() for v in bias.inputs if v is not None and v.const_value is not None]
    return bias.outputs[0] if vectors == [(linear.out_features,)] and not _takes_bias(bias) else linear.y


def _takes_bias(bias: ir.Node) -> bool:
    """Whether what reads a biased output is fused with the bias."""
    for reader in bias.outputs[0].consumers():
        normed = _only_reader(reader.outputs[0]) if reader.op_type == "Add" else None  # a residual, then the norm
        if reader.op_type in _TAKE_A_BIAS or (normed is not None and normed.op_type == "LayerNormalization"):
            return True
    return False


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and not value.is_graph_output() else None


def _branch(model: ir.Model, match: Match, x: ir.Value, y: ir.Value, fed: Mapping[str, ir.DataType]) -> ir.Value:
    """Put the module's branch between `y` and its readers."""
    name = match.module.name
    sizes = [f"{name}.{size}" for size in ("num_blocks", "block_size_in", "block_size_out")]
    blocks = _fed_empty(model, opschema.input_name(name), fed[opschema.input_name(name)], sizes)
    given, operator = [x, blocks, y], opschema.NAME
    if blocks.dtype == ir.DataType.INT8:
        scales = _fed_empty(model, opschema.scales_name(name), ir.DataType.FLOAT, sizes[:1])
        given, operator = [x, blocks, scales, y], opschema.NAME_INT8
    runs = sum(user.domain == opschema.DOMAIN for user in blocks.consumers())  # of a module that runs several times
    node = ir.Node(opschema.DOMAIN, operator, given, metadata_props={MODULE: name})
    node.name = f"{name}/{operator}" + (f"_{runs}" if runs else "")
    return _insert(model, [node], y, node.outputs[0], match.pieces[0].linear.dtype)


def _fed_empty(model: ir.Model, name: str, dtype: ir.DataType, sizes: Sequence[str]) -> ir.Value:
    """A graph input whose default is empty; the one that there is, of a module that runs several times."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    value = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype))
    value.const_value = ir.Tensor(np.zeros([0] * len(sizes), dtype.numpy()), name=name)
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    return value


def _insert(model: ir.Model, nodes: Sequence[ir.Node], old: ir.Value, new: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Insert `nodes` after `old`, and let its readers read their result `new` instead."""
    producer = old.producer()
    assert producer is not None
    new.name, new.shape, new.type = f"{old.name}/diablo", old.shape, ir.TensorType(dtype)
    model.graph.insert_after(producer, nodes)
    _redirect(model, old, new, nodes)
    return new


def _redirect(model: ir.Model, old: ir.Value, new: ir.Value, but: Sequence[ir.Node]) -> None:
    """Let the readers of `old`, the graph's outputs among them, read `new` instead; not the nodes `but`."""
    for reader, index in list(old.uses()):
        if reader not in but:
            reader.replace_input_with(index, new)
    if old.is_graph_output():  # the output keeps its name
        old.name, new.name = f"{old.name}/base", old.name
        for index, value in enumerate(model.graph.outputs):
            if value is old:
                model.graph.outputs[index] = new


def _branches_of_fused(model: ir.Model, matches: Sequence[Match], fed: Mapping[str, ir.DataType]) -> None:
    """The branches of modules that are rows of one node."""
    linear = matches[0].pieces[0].linear
    rows = {(match.pieces[0].start, match.pieces[0].stop) for match in matches}
    split = _split_after(linear)
    if split is None or not rows <= split.keys():
        split = _own_split(model, linear, rows)
    for match in matches:
        _branch(model, match, linear.x, split[match.pieces[0].start, match.pieces[0].stop], fed)


def _split_after(linear: Linear) -> dict[tuple[int, int], ir.Value] | None:
    """The outputs of a Split along the last axis that alone reads the node, or its bias; by the rows they hold."""
    value = linear.y
    for _ in range(2):  # the node itself, then a bias
        node = _only_reader(value)
        if node is None:
            return None
        if node.op_type == "Split":
            return _rows_of_split(node, linear)
        if node.op_type != "Add" or not any(v is not None and v.const_value is not None for v in node.inputs):
            return None
        value = node.outputs[0]
    return None


def _rows_of_split(node: ir.Node, linear: Linear) -> dict[tuple[int, int], ir.Value] | None:
    rank = len(linear.y.shape) if linear.y.shape is not None else None
    if attribute(node, "axis") not in (-1, rank - 1 if rank else -1):
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    known = ir.convenience.get_const_tensor(given) if given is not None else None
    if known is not None:
        sizes = [int(size) for size in known.numpy()]
    elif given is None and linear.out_features % len(node.outputs) == 0:
        sizes = [linear.out_features // len(node.outputs)] * len(node.outputs)
    else:
        return None
    stops = np.cumsum(sizes).tolist()
    return {(stop - size, stop): output for size, stop, output in zip(sizes, stops, node.outputs, strict=True)}


def _own_split(model: ir.Model, linear: Linear, rows: Iterable[tuple[int, int]]) -> dict[tuple[int, int], ir.Value]:
    """Take the node's output apart where the modules meet and join it again; the parts, by the rows they hold."""
    edges = sorted({0, linear.out_features, *itertools.chain(*rows)})
    ranges = list(itertools.pairwise(edges))
    whole = output(linear)
    node = _split(model, whole, [stop - start for start, stop in ranges], linear.name, linear.dtype)
    parts = node.outputs
    join = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", -1)], name=f"{linear.name}/diablo_join")
    _insert(model, [node, join], whole, join.outputs[0], linear.dtype)
    return dict(zip(ranges, parts, strict=True))


def _branch_over_parts(model: ir.Model, match: Match, fed: Mapping[str, ir.DataType]) -> None:
    """The branch of a module whose outputs several nodes make: join them, add, take them apart again."""
    layers = [piece.linear for piece in match.pieces]
    outputs = [output(layer) for layer in layers]
    join = ir.Node("", "Concat", outputs, [ir.AttrInt64("axis", -1)])
    join.name = f"{match.module.name}/diablo_join"
    joined = join.outputs[0]
    joined.name = f"{match.module.name}/diablo_joined"
    joined.type = ir.TensorType(layers[0].dtype)
    joined.shape = _with_width(outputs[0].shape, match.module.out_features)
    split = _split(model, joined, [layer.out_features for layer in layers], match.module.name, joined.dtype)
    model.graph.insert_after(layers[-1].node, [join, split])
    for value, part in zip(outputs, split.outputs, strict=True):
        _redirect(model, value, part, [join])
    _branch(model, match, layers[0].x, joined, fed)


def _split(model: ir.Model, value: ir.Value, sizes: Sequence[int], name: str, dtype: ir.DataType | None) -> ir.Node:
    """A Split of `value` along its last axis, not yet in the graph."""
    tensor = ir.tensor(np.array(sizes, np.int64), name=f"{name}/diablo_sizes")
    widths = ir.Value(
        name=tensor.name, shape=ir.Shape([len(sizes)]), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(widths)
    node = ir.Node("", "Split", [value, widths], [ir.AttrInt64("axis", -1)], num_outputs=len(sizes))
    node.name = f"{name}/diablo_split"
    for index, (part, size) in enumerate(zip(node.outputs, sizes, strict=True)):
        part.name, part.shape = f"{name}/diablo_part_{index}", _with_width(value.shape, size)
        part.type = ir.TensorType(dtype) if dtype is not None else None
    return node


def _with_width(shape: ir.Shape | None, width: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape.dims[:-1], width])
