"""What a file or folder is: adapter, checkpoint, ONNX model, output folder, patch, the paper's adapter.chkpt.

Every report is a plain dict that begins with `kind` and `path`. Only headers are read, but where an adapter is compared
with a model: then the adapted weights are.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diablo_export import patch_header
from diablo_export.adapter import CONFIG, Adapter, stored_transposed
from diablo_export.base_grid import BaseGrid
from diablo_export.blockdiag import BlockShape
from diablo_export.checkpoint import Checkpoint, TensorInfo, read_json, resolve
from diablo_export.converters.hf_packed import packed_modules
from diablo_export.errors import InputError
from diablo_export.manifest import MANIFEST, PARITY, read_manifest
from diablo_export.packed.modules import Stored, all_stored, check_base

Report = dict[str, Any]
PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def inspect(path: str | Path, model: str | Path | None = None, adapter: str | Path | None = None) -> Report:
    """Say what `path` is and, given the other half, what of an adapter and a model would match.

    Args:
        path: a folder, a file, or a Hugging Face id.
        model: for an adapter or an adapter.chkpt: the base to compare it with.
        adapter: for a model: the adapter to compare it with.

    Returns:
        `{"kind", "path", …}`; with a comparison also `"fits"` and `"faults"`.

    Raises:
        InputError: nothing that this program knows.
    """
    place = Path(path)
    if place.suffix == ".chkpt" and place.is_file():
        return _chkpt(place, model)
    if place.is_file() and patch_header.is_patch(place):
        return _patch(place)
    if (place / CONFIG).is_file():
        return _adapter(place, model)
    if place.is_file() or (place.is_dir() and not (place / "config.json").is_file()) or _has_onnx(place):
        from diablo_export.converters.inspection_onnx import inspect_onnx

        report = inspect_onnx(place, adapter)
    else:
        report = _checkpoint(resolve(path), adapter)
    return report | _output_folder(place)


def _has_onnx(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.onnx")) and not any(folder.glob("*.safetensors"))


def _adapter(folder: Path, model: str | Path | None) -> Report:
    adapter = Adapter.load(folder)
    report: Report = {
        "kind": "DiaBlo adapter",
        "path": str(folder),
        "task": adapter.task_type,
        "base": adapter.base_model,
        **({"trained_beside": _beside(adapter.base_grid)} if adapter.base_grid else {}),
        "num_blocks": adapter.num_blocks,
        "target_modules": adapter.target_modules,
        "adapted_modules": len(adapter.modules),
        "parameters": adapter.parameters,
        "saved_modules": adapter.modules_to_save,
        "labels": adapter.labels,
        "modules": _module_groups(adapter),
    }
    return report | (_fit(lambda: check_base(Checkpoint.open(model), adapter), model) if model else {})


def _beside(grid: BaseGrid) -> str:
    return f"{grid} weights{', whose codes the blocks move' if grid.on_grid else ''}"


def _fit(check: Callable[[], object], other: str | Path) -> Report:
    try:
        check()
    except InputError as error:
        return {"compared_with": str(other), "fits": False, "faults": str(error)}
    return {"compared_with": str(other), "fits": True, "faults": ""}


def _module_groups(adapter: Adapter) -> list[Report]:
    """The adapted modules, those of one name and size together."""
    counts = Counter((module.name.rpartition(".")[2], module.shape) for module in adapter.modules.values())
    return [
        {
            "module": leaf,
            "count": count,
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "blocks": " × ".join(map(str, shape.blocks)),
            "covered_outputs": f"{shape.covered_outputs / shape.out_features:.0%}",
            "live_parameters": count * shape.live_parameters,
        }
        for (leaf, shape), count in counts.items()
    ]


def _checkpoint(folder: Path, adapter: str | Path | None) -> Report:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    quantized = all_stored(checkpoint)
    groups = _linear_groups(checkpoint, quantized)
    quantization = config.get("quantization_config")
    report: Report = {
        "kind": "Hugging Face checkpoint",
        "path": str(folder),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "quantized": (quantization.get("quant_method") if isinstance(quantization, dict) else quantization) or False,
        "files": len(checkpoint.files),
        "bytes": sum(info.nbytes for info in checkpoint),
        "parameters": sum(
            math.prod(shape)
            for shape in (*(info.shape for info in _floats(checkpoint, quantized)), *(one.shape for one in quantized))
        ),
        "dtypes": dict(Counter(info.dtype for info in checkpoint)),
        "linear_layers": groups,
        "num_blocks_options": _options(groups),
    }
    if not adapter:
        return report
    loaded = Adapter.load(adapter)
    packed = packed_modules(checkpoint, loaded)
    named = {name: checkpoint.weight_of(name) or packed.get(name) for name in loaded.modules}
    found = sum(info is not None for info in named.values())
    return report | {"adapter_modules_found": f"{found} of {len(named)}"} | _fit(
        lambda: check_base(checkpoint, loaded), adapter
    )  # fmt: skip


def _floats(checkpoint: Checkpoint, quantized: Iterable[Stored]) -> list[TensorInfo]:
    """The tensors that are no part of a quantized weight."""
    parts = {info.name for one in quantized for info in one.infos.values()}
    return [info for info in checkpoint if info.name not in parts]


def _linear_groups(checkpoint: Checkpoint, quantized: Iterable[Stored]) -> list[Report]:
    """The matrices of the numbered layers, those of one name and size together, and the N that divide both sizes."""
    transposed = stored_transposed(checkpoint.config)
    counts: Counter[tuple[str, int, int, str]] = Counter()
    floats = _floats(checkpoint, quantized)
    stored = [
        (info.name.removesuffix(".weight"), info.shape[::-1] if transposed else info.shape, info.dtype)
        for info in floats if info.name.endswith(".weight") and len(info.shape) == 2
    ]  # fmt: skip
    stored += [(one.name, one.shape, str(one.config["quant_method"])) for one in quantized]
    for name, (out_features, in_features), dtype in stored:
        if numbered := re.search(r"(?:^|\.)\d+\.(.+)$", name):
            counts[numbered[1], in_features, out_features, dtype] += 1
    return [
        {
            "module": name,
            "count": count,
            "in_features": in_features,
            "out_features": out_features,
            "dtype": dtype,
            "num_blocks_that_divide": _divisors(math.gcd(in_features, out_features)),
        }
        for (name, in_features, out_features, dtype), count in counts.items()
    ]


def _options(groups: list[Report]) -> list[Report]:
    """What each num_blocks that divides every target would train; targets as `train` chooses them by default."""
    leaves = {group["module"].rpartition(".")[2] for group in groups}
    chosen = [g for g in groups if g["module"].endswith(PAPER_TARGETS)] if leaves.issuperset(PAPER_TARGETS) else groups
    common = math.gcd(*(size for group in chosen for size in (group["in_features"], group["out_features"])))
    return [
        {"num_blocks": n, "parameters": sum(group["count"] * _parameters(group, n) for group in chosen)}
        for n in _divisors(common)
        if n > 1
    ]


def _parameters(group: Report, num_blocks: int) -> int:
    return BlockShape.for_linear(group["in_features"], group["out_features"], num_blocks).live_parameters


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _patch(file: Path) -> Report:
    said = patch_header.summary(file, patch_header.read(file)[0])
    files = [
        {"name": each["name"], **{side: each[side] and each[side]["bytes"] for side in ("before", "after")}}
        | {"changed_bytes": each["changed_bytes"]}
        for each in said.pop("files")
    ]
    return {"kind": "patch", "path": str(file), **said, "share": round(said["share"], 4), "files": files}


def _chkpt(file: Path, model: str | Path | None) -> Report:
    from diablo_export.converters.diablo_chkpt import BLOCKS, load_tensors, read_chkpt

    tensors = load_tensors(file)
    blocks = {name.removesuffix(BLOCKS): value for name, value in tensors.items() if name.endswith(BLOCKS)}
    counts = Counter((name.rpartition(".")[2], value.shape, str(value.dtype)) for name, value in blocks.items())
    report: Report = {
        "kind": "adapter.chkpt of the DiaBlo paper",
        "path": str(file),
        "adapted_modules": len(blocks),
        "num_blocks": max((value.shape[0] for value in blocks.values()), default=0),
        "target_modules": sorted({name.rpartition(".")[2] for name in blocks}),
        "parameters": sum(value.size for value in tensors.values()),
        "other_entries": [name for name in tensors if not name.endswith(BLOCKS)],
        "modules": [
            {"module": leaf, "count": count, "blocks": " × ".join(map(str, shape)), "dtype": dtype}
            for (leaf, shape, dtype), count in counts.items()
        ],
    }
    return report | (_fit(lambda: read_chkpt(file, Checkpoint.open(model), str(model)), model) if model else {})


def _output_folder(place: Path) -> Report:
    """What the manifest of an output folder adds: how it was made, whether its files are still the same size."""
    folder = place if place.is_dir() else place.parent
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_manifest(folder)
    actions = Counter(entry.get("action", "?") for entry in manifest.get("modules", []))
    report: Report = {
        "made_by": f"diablo-export {manifest['versions'].get('diablo-export', '?')} {manifest['command']}",
        "base": (manifest.get("base") or {}).get("path"),
        "made_with": [f"{entry.get('name')} ({entry.get('path')})" for entry in manifest.get("adapters", [])],
        "exporter": manifest.get("exporter"),
        "modules_by_action": dict(actions),
        "changed_files": _changed(folder, manifest["files"].items()),
    }
    if (folder / PARITY).is_file():
        report["parity"] = read_json(folder / PARITY).get("verdict")
    return {key: value for key, value in report.items() if value is not None}


def _changed(folder: Path, files: Iterable[tuple[str, Any]]) -> list[str]:
    """Files that are gone or of another size than the manifest says."""
    return [
        name for name, entry in files
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]
    ]  # fmt: skip


def to_json(report: Report) -> str:
    """The report as `--json` prints it."""
    return json.dumps(report, indent=1, ensure_ascii=False)
