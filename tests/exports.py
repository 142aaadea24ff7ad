"""Output folders for the tests of parity: good ones, and ones with a fault planted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnx

from diablo_export.adapter import Adapter, file_sha256
from diablo_export.converters.export import export
from diablo_export.converters.merge import merge
from diablo_export.manifest import MANIFEST, adapter_entry, read_manifest

# a few hundred tokens and a few steps: enough for every figure, and quick; modules have tests of their own
SMALL: dict[str, Any] = {"max_tokens": 160, "steps": 6, "threads": 1, "modules": False}


def scaled(adapter: Path, folder: Path, scale: float) -> Path:
    """The same adapter with its blocks multiplied by `scale`."""
    loaded = Adapter.load(adapter)
    modules = {
        n: dataclasses.replace(m, blocks=m.blocks * m.blocks.dtype.type(scale)) for n, m in loaded.modules.items()
    }
    folder.mkdir(parents=True)
    dataclasses.replace(loaded, modules=modules).save(folder)
    return folder


def merged(model: Path, adapter: Path, out: Path, **options: Any) -> Path:
    merge(model, adapter, out, **{"format": "onnx", **options})
    return out


def branched(model: Path, adapters: dict[str, Path], out: Path, **options: Any) -> Path:
    export(model, adapters, out, **options)
    return out


def copy(out: Path, target: Path) -> Path:
    shutil.copytree(out, target)
    return target


def pretend(out: Path, adapter: Path) -> Path:
    """Have the manifest say that another adapter went into `out` than the one that did."""
    manifest = read_manifest(out)
    manifest["adapters"] = [adapter_entry(manifest["adapters"][0]["name"], Adapter.load(adapter))]
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def announce(out: Path) -> Path:
    """Have the manifest hash the files as they are now, so that only the planted fault can be found."""
    manifest = read_manifest(out)
    for name, entry in manifest["files"].items():
        entry["sha256"] = file_sha256(out / name)
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def flip_byte(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def shrink_cached_values(out: Path, by: float) -> Path:
    """A decoder that forgets: what it puts into its KV cache is a bit too small, so only decoding goes wrong."""
    model = onnx.load(out / "model.onnx", load_external_data=False)
    for output in [o for o in model.graph.output if o.name.startswith("present") and o.name.endswith("value")]:
        inner = f"{output.name}.whole"
        for node in model.graph.node:
            node.output[:] = [inner if name == output.name else name for name in node.output]
        factor = onnx.helper.make_node("Constant", [], [f"{inner}.factor"], value_float=by)
        model.graph.node.extend([factor, onnx.helper.make_node("Mul", [inner, f"{inner}.factor"], [output.name])])
    onnx.save(model, out / "model.onnx")
    return announce(out)


def checks(report: dict[str, Any]) -> dict[str, bool]:
    return {check["name"]: check["pass"] for check in report["checks"]}


def failed(report: dict[str, Any]) -> set[str]:
    return {name for name, held in checks(report).items() if not held}
