"""What an ONNX model is: its linear layers by layout, its branches, its inputs that can be fed, its adapters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
from safetensors.numpy import load_file

from diablo_export import opschema
from diablo_export.adapter import Adapter
from diablo_export.block_storage import BASE_KEY, SCALES_SUFFIX, base_mark
from diablo_export.converters.onnx_adapters import ENDING, FOLDER
from diablo_export.converters.onnx_aside import unread
from diablo_export.converters.onnx_file import find
from diablo_export.converters.onnx_linears import Linear, linears
from diablo_export.converters.onnx_match import match
from diablo_export.converters.onnx_web import ENDING as WEB_ENDING
from diablo_export.errors import DependencyError, InputError

_SHOWN = 8  # graph inputs named one by one


def inspect_onnx(path: Path, adapter: str | Path | None = None) -> dict[str, Any]:
    """Report on an ONNX file, a folder with one, or an .onnx_adapter file; with an adapter, what it would match.

    Raises:
        InputError: none of these.
    """
    if path.suffix == ENDING and path.is_file():
        return {"kind": "onnxruntime adapter", "path": str(path), **_adapter_file(path)}
    found = find(path) if path.exists() else None
    if found is None:
        raise InputError(
            f"{path}: nothing that is known here; give an adapter folder, a Hugging Face folder, an .onnx file or "
            "folder, an .onnx_adapter or an adapter.chkpt"
        )
    file, model = found.file, found.graph
    layers = linears(model)
    branches = [node for node in model.graph if node.domain == opschema.DOMAIN]
    fed = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    overridable = [str(value.name) for value in model.graph.inputs if value.name in model.graph.initializers]
    report: dict[str, Any] = {
        "kind": "ONNX model",
        "path": str(path),
        "file": file.name,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))) or None,
        "ir_version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "bytes": sum(part.stat().st_size for part in found.files),
        "nodes": sum(1 for _ in model.graph),
        "inputs": [_signature(value) for value in fed[:_SHOWN]] + ([f"… {len(fed)} in all"] if fed[_SHOWN:] else []),
        "outputs": [_signature(value) for value in model.graph.outputs[:2]],
        "linear_layers": _groups(layers),
        "other_weights": unread(model.graph, {layer.node for layer in layers}) or None,
        "branches": len(branches),
        "overridable_inputs": len(overridable),
        "carries_function": any(function.domain == opschema.DOMAIN for function in model.functions.values()),
        "genai": (file.parent / "genai_config.json").is_file(),
        "base_mark": f"{base_mark(said):08x}" if (said := model.metadata_props.get(BASE_KEY)) else None,
        "adapters": [{"name": each.stem, **_adapter_file(each)} for each in _adapters(file.parent)],
    }
    return report | (_matches(model, Adapter.load(adapter)) if adapter else {})


def _adapters(folder: Path) -> list[Path]:
    return sorted(file for ending in (ENDING, WEB_ENDING) for file in (folder / FOLDER).glob(f"*{ending}"))


def _signature(value: ir.Value) -> str:
    dims = ", ".join(str(dim) for dim in value.shape) if value.shape is not None else "?"
    return f"{value.name} {value.dtype.name.lower() if value.dtype else '?'} [{dims}]"


def _groups(layers: list[Linear]) -> list[dict[str, Any]]:
    """The linear layers by layout, bits and group size."""
    counts = Counter(
        (layer.layout, layer.bits, layer.group_size, bool(layer.bits) and layer.zero_points is None) for layer in layers
    )
    return [
        {
            "layout": layout,
            "count": count,
            "weights": f"int{bits}" if bits else "float",
            "group_size": group_size if bits else None,
            "symmetric": symmetric if bits else None,
        }
        for (layout, bits, group_size, symmetric), count in sorted(counts.items())
    ]


def _adapter_file(file: Path) -> dict[str, Any]:
    """Tensors and size of an .onnx_adapter or a safetensors file; of the first the size alone without onnxruntime."""
    from diablo_export.runtime import load_adapter

    entry: dict[str, Any] = {"bytes": file.stat().st_size}
    try:
        swap = None if file.suffix == WEB_ENDING else load_adapter(file)
    except DependencyError:
        return entry
    values = load_file(file) if swap is None else swap.values()
    adapted = [value for name, value in values.items() if value.ndim == 3 and value.size]
    return entry | {
        "tensors": len(values),
        "adapted_modules": len(adapted),
        "parameters": sum(v.size for name, v in values.items() if not name.endswith(SCALES_SUFFIX)),
        "block_dtype": ", ".join(sorted({str(value.dtype) for value in adapted})) or None,
        "base_mark": None if swap is None or swap.base is None else f"{swap.base:08x}",
    }


def _matches(model: ir.Model, adapter: Adapter) -> dict[str, Any]:
    """Which node each adapted module is, or why not."""
    try:
        found = match(model, adapter.modules)
    except InputError as error:
        return {"compared_with": str(adapter.path), "fits": False, "faults": str(error)}
    rows = [
        {"module": name, "node": " + ".join(piece.linear.name for piece in one.pieces), "why": one.why}
        for name, one in found.items()
    ]
    return {"compared_with": str(adapter.path), "fits": True, "faults": "", "matches": rows}
