"""The torch road: torch.onnx.export of the Hugging Face model, its weights on the meta device.

For what onnxruntime-genai's builder does not have: encoders, GPT-2, head sizes that GroupQueryAttention refuses. The
export never sees a weight, so it costs no memory; afterwards each linear layer is one MatMul (and an Add), which
is what quantization, merges and branches work on.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from diablo_export.adapter import head_classes
from diablo_export.checkpoint import decoder_class
from diablo_export.converters.hf_folder import padding
from diablo_export.converters.onnx_names import SCOPES
from diablo_export.converters.onnx_nodes import Layout, Origin, Weights
from diablo_export.errors import ExportError, require

_DTYPES = {"fp32": "float32", "fp16": "float16"}
# sizes of the example inputs: all different and above 1, so that the export takes none of them for fixed
_BATCH, _SEQUENCE, _PAST = 2, 3, 5
# tracing takes seconds per layer and depends on the config alone: the last graphs are kept, they hold no weights
_TRACED: dict[str, tuple[Layout, dict[str, Any]]] = {}
_KEPT = 8


def layout(
    weights: Weights, folder: Path, *, task: str, precision: str = "fp32", share_embeddings: bool = False
) -> Layout:
    """Export the graph of a model; writes its tokenizer's files into `folder`.

    Args:
        weights: names the checkpoint, and the saved head, whose size decides the number of classes.
        folder: the output folder.
        task: causal-lm or text-classification.
        precision: fp32 or fp16.
        share_embeddings: one table for a tied embedding and head.

    Raises:
        ExportError: transformers has no such model, or torch cannot export it.
    """
    require("onnxscript", "train")
    require("accelerate", "train")
    try:
        with _quiet():
            config = _config(weights, task)
            share = share_embeddings and task == "causal-lm"  # a classifier has no such head
            key = f"{task} {precision} {share} {config.to_json_string()}"
            if key not in _TRACED:
                while len(_TRACED) >= _KEPT:
                    del _TRACED[next(iter(_TRACED))]
                _TRACED[key] = _trace(config, task, precision, share)
            _save_tokenizer(weights.checkpoint.folder, folder)
    except Exception as error:  # torch.export and transformers raise what they like
        raise ExportError(
            f"{weights.checkpoint.folder}: torch cannot export this model for {task}: {_first_line(error)}. merge "
            "--format hf can take it; or export it by other means, and give that ONNX model as --model"
        ) from error
    traced, saved_buffers = _TRACED[key]
    absent = {name: value for name, value in saved_buffers.items() if weights.checkpoint.find(name) is None}
    graph = traced.model.clone()
    for name in absent.keys() & graph.graph.initializers.keys():
        graph.graph.initializers[name].const_value = ir.tensor(absent[name], name=name)
    return replace(traced, model=graph, origins={n: o for n, o in traced.origins.items() if n not in absent})


def _trace(config: Any, task: str, precision: str, share: bool) -> tuple[Layout, dict[str, Any]]:
    """The layout, and the buffers that a checkpoint may hold (Gemma 4's layer scales) as they begin."""
    model, buffers, tied = _empty_model(config, task, precision, share)
    saved = {name: buffers.pop(name) for name in model.state_dict() if name in buffers}
    program = _export_decoder(model) if task == "causal-lm" else _export_classifier(model)
    stored = {name for name, _ in model.named_parameters(remove_duplicate=False)} | saved.keys()
    graph = _simplified(program, stored, buffers)
    return Layout(graph, _origins(graph.graph, model, stored), tied), saved


def _config(weights: Weights, task: str) -> Any:
    """The model's config, with as many classes as the saved head has, and the padding that its tokenizer makes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(weights.checkpoint.folder)
    if task == "text-classification" and (classes := head_classes(weights.saved)):
        config.num_labels = classes
    if task == "text-classification":
        config.update(padding(weights.checkpoint, weights.saved))
    # plain softmax(QKᵀ + mask)V: onnxruntime's optimizer knows it, and it can be traced without values
    config._attn_implementation = "eager"
    return config


def _empty_model(config: Any, task: str, precision: str, share: bool) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The Hugging Face model on the meta device, its buffers' values, and what is tied."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    from diablo_export.converters.torch_experts import use_operator

    auto: Any = getattr(transformers, decoder_class(config.to_dict()))
    if task == "text-classification":
        auto = transformers.AutoModelForSequenceClassification
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=getattr(torch, _DTYPES[precision])).eval()
    use_operator(model)
    buffers = {name: buffer.numpy() for name, buffer in model.named_buffers()}
    model.to("meta")
    model.tie_weights()  # initialising parameter by parameter has cut the ties
    return model, buffers, _tied(model, separate=not share)


def _tied(model: Any, separate: bool) -> dict[str, str]:
    """Parameters that share another one's values; `separate` gives each a placeholder of its own."""
    import torch

    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if first.setdefault(id(parameter), name) == name:
            continue
        tied[name] = first[id(parameter)]
        if separate:
            module, _, leaf = name.rpartition(".")
            own = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            model.get_submodule(module).register_parameter(leaf, own)
    return tied


def _export_classifier(model: Any) -> Any:
    from diablo_export.converters.torch_scalars import ScalarsKept

    original = model.forward
    takes_types = "token_type_ids" in _arguments(original) and getattr(model.config, "type_vocab_size", 0) > 0
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if takes_types else [])]

    def forward(input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
        more = {"token_type_ids": token_type_ids} if takes_types else {}
        with ScalarsKept():
            return original(input_ids=input_ids, attention_mask=attention_mask, **more).logits

    model.forward = forward
    examples = tuple(_integers(_BATCH, _SEQUENCE) for _ in names)
    dims = tuple({0: "batch_size", 1: "sequence_length"} for _ in names)
    return _export(model, examples, dims, names, ["logits"])


def _export_decoder(model: Any) -> Any:
    import torch

    from diablo_export.converters.torch_scalars import ScalarsKept
    from diablo_export.converters.torch_states import cache_of, is_state, kept, scans

    original = model.forward
    one = _integers(1, 1)
    output = original(input_ids=one, attention_mask=one, position_ids=one, use_cache=True)
    # keys (1, key-value heads, 1, head size); the last layers of Gemma 3n and 4 read those of others and keep none
    first = kept(getattr(output, "past_key_values", None))
    if not first:
        raise NotImplementedError("what it keeps from token to token is no cache of keys and values")

    def forward(input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
        with ScalarsKept():
            output = original(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache_of(dict(zip(first, past, strict=True))),
                use_cache=True,
            )
        present = kept(output.past_key_values)
        return output.logits, [present[name] for name in first]

    model.forward = forward
    past = []
    for name, tensor in first.items():
        shape = tensor.shape[1:] if is_state(name) else (tensor.shape[1], _PAST, tensor.shape[3])
        past.append(torch.empty(_BATCH, *shape, dtype=tensor.dtype, device="meta"))
    total = _integers(_BATCH, _PAST + _SEQUENCE)
    examples = (_integers(_BATCH, _SEQUENCE), total, _integers(_BATCH, _SEQUENCE), past)
    tokens = {0: "batch_size", 1: "sequence_length"}
    cached = [{0: "batch_size"} | ({} if is_state(name) else {2: "past_sequence_length"}) for name in first]
    dims = (tokens, {0: "batch_size", 1: "total_sequence_length"}, tokens, cached)
    pasts = [f"past.{name}" if is_state(name) else f"past_key_values.{name}" for name in first]
    inputs = ["input_ids", "attention_mask", "position_ids", *pasts]
    with scans(model, any(name.endswith(".recurrent") for name in first)):
        return _export(model, examples, dims, inputs, ["logits", *(f"present.{name}" for name in first)])


def _export(model: Any, examples: Any, dims: Any, inputs: list[str], outputs: list[str]) -> Any:
    import torch

    return torch.onnx.export(
        model,
        examples,
        dynamo=True,
        optimize=False,  # it would fold placeholders
        dynamic_shapes=dims,
        input_names=inputs,
        output_names=outputs,
        verbose=False,
    )


def _simplified(program: Any, stored: set[str], buffers: dict[str, Any]) -> ir.Model:
    """The exported graph with its buffers' values, constants folded, and each linear layer as one MatMul."""
    from onnxscript import optimizer

    model: ir.Model = program.model
    for name, value in model.graph.initializers.items():
        if name in stored:
            value.const_value = None
        elif name in buffers:
            value.const_value = ir.tensor(buffers[name], name=name)
    optimizer.optimize_ir(model)
    _split_gemms(model.graph)
    _drop_transposes(model.graph)
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()  # stack traces with paths of this machine
        node.doc_string = None
        if scopes:
            node.metadata_props[SCOPES] = scopes
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    return model


def _split_gemms(graph: ir.Graph) -> None:
    """Gemm with a weight becomes MatMul and Add: one form of linear layer for everything that follows."""
    for node in list(graph):
        if node.op_type != "Gemm" or node.attributes.get_int("transA", False):
            continue
        x, weight, bias = (*node.inputs, None)[:3]
        if (
            weight is None
            or not weight.is_initializer()
            or any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
        ):
            continue
        if node.attributes.get_int("transB", False):
            flipped = ir.node("Transpose", [weight], {"perm": [1, 0]})
            graph.insert_before(node, flipped)
            weight = flipped.outputs[0]
        product = ir.node("MatMul", [x, weight], name=f"{node.name}_MatMul", metadata_props=dict(node.metadata_props))
        graph.insert_before(node, product)
        last = product
        if bias is not None:
            last = ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_Add")
            graph.insert_before(node, last)
        old, new = node.outputs[0], last.outputs[0]
        product.outputs[0].type, product.outputs[0].shape = old.type, old.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], [], [old], [new])


def _drop_transposes(graph: ir.Graph) -> None:
    """A weight that is only transposed for a MatMul is stored transposed; whoever else reads it gets it back."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if (
            weight is None
            or not weight.is_initializer()
            or weight.const_value is not None
            or len(weight.shape or ()) != 2
        ):
            continue
        others = [(user, index) for user, index in weight.uses() if user is not node]
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        rows, columns = weight.shape  # type: ignore[misc]
        weight.shape = ir.Shape((columns, rows))
        weight.meta["transposed"] = True
        if others:
            back = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{weight.name}_rows")
            graph.insert_before(next(iter(graph)), back)
            for user, index in others:
                user.replace_input_with(index, back.outputs[0])


def _origins(graph: ir.Graph, model: Any, stored: set[str]) -> dict[str, Origin]:
    from transformers.pytorch_utils import Conv1D

    from diablo_export.trainer.experts import is_experts

    experts = {name: module for name, module in model.named_modules() if is_experts(module)}
    conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    origins = {}
    for name in stored:
        value = graph.initializers.get(name)
        if value is None:
            continue
        module, _, leaf = name.rpartition(".")
        if module in experts:
            origins[name] = _expert_origin(name, value, experts[module])
            continue
        flipped = bool(value.meta.get("transposed"))
        # Conv1D keeps (in, out): what is stored there as it is, is transposed to nn.Linear's (out, in)
        is_conv1d = module in conv1d and leaf == "weight"
        origins[name] = Origin(name, transposed=flipped != is_conv1d, conv1d=is_conv1d)
    return origins


def _expert_origin(name: str, value: ir.Value, experts: Any) -> Origin:
    """As the MoE operator has it: (experts, out_features, in_features), gate and up by turns."""
    swapped = experts.is_transposed and value.shape is not None and len(value.shape) == 3
    if swapped:
        count, inputs, outputs = value.shape  # type: ignore[misc]
        value.shape = ir.Shape((count, outputs, inputs))
    return Origin(name, swapped=swapped, by_turns=experts.is_concatenated and "gate_up_proj" in name)


def _save_tokenizer(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _integers(*shape: int) -> Any:
    import torch

    return torch.ones(*shape, dtype=torch.int64, device="meta")


def _arguments(function: Any) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


def _first_line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's and transformers' chatter about exporting; what matters is raised."""
    names = ("torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
