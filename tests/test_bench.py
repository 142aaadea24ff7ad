from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diablo_export import runtime
from diablo_export.errors import ExportError, InputError
from diablo_export.manifest import MANIFEST
from diablo_export.timing import report as bench_report
from diablo_export.timing.bench import bench
from diablo_export.timing.sessions import VARIANTS
from tests import exports

Get = Callable[..., Path]
QUICK: dict[str, Any] = {"prefill": [8], "past": 4, "rounds": 3, "threads": 1}


@pytest.fixture(scope="module")
def report(exported: Get, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    files = tmp_path_factory.mktemp("bench")
    made = bench(exported("llama"), **QUICK, control=True, json=files / "r.json", png=files / "r.png")
    assert made == json.loads((files / "r.json").read_text())
    assert size_of_png(files / "r.png") == tuple(round(each * bench_report.DPI) for each in bench_report.SIZE)
    return made


def size_of_png(file: Path) -> tuple[int, int]:
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    assert content[-8:-4] == b"IEND"  # the file is whole
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_decoder_is_timed_at_each_length_and_decoding(report: dict[str, Any]) -> None:
    assert [(work["name"], work["tokens"], work["past"]) for work in report["work"]] == [
        ("prefill 8", 8, 0),
        ("decode at 4", 1, 4),
    ]
    timed = set(VARIANTS) - {"merged"} - (set() if runtime.find_library() else {"branch-kernels", "empty-kernels"})
    for work in report["work"]:
        assert set(work["variants"]) == timed and work["failed"] == {} and work["rounds"] == 3
    assert "a merge has the graph of the base" in report["variants"]["merged"]["skipped"]


def test_figures_follow_from_the_turns(report: dict[str, Any]) -> None:
    for work in report["work"]:
        base = np.array(work["variants"]["base"]["turns"])
        assert work["variants"]["base"]["ratio"] == {"median": 1, "low": 1, "high": 1, "of_fastest": 1}
        for figures in work["variants"].values():
            turns, seconds, ratio = np.array(figures["turns"]), figures["seconds"], figures["ratio"]
            assert turns.shape == (3,) and turns.min() > 0
            assert seconds["min"] == turns.min() and seconds["median"] == np.median(turns)
            assert seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
            assert ratio["median"] == pytest.approx(np.median(turns / base))
            assert ratio["low"] <= ratio["median"] <= ratio["high"]
            # this thread did all the work, so it had the processor for no longer than the clock ran, whose pace is
            # kept to the world's and so can differ by some thousandths
            assert (np.array(figures["processor_turns"]) <= turns * 1.01).all()


def test_parameters_are_equal(report: dict[str, Any], exported: Get) -> None:
    blocks = runtime.load_adapter(exported("llama") / "adapters" / "a.onnx_adapter").values()
    count = sum(value.size for value in blocks.values())
    variants = report["variants"]
    assert variants["branch"]["parameters"] == count and variants["branch"]["bytes"] == 4 * count
    assert variants["base"]["parameters"] == variants["empty"]["parameters"] == 0
    # a rank is a whole number: half a rank of each of the 14 layers at the most
    assert abs(variants["lora"]["parameters"] - count) <= 14 * (64 + 96) / 2


def test_tables_show_every_variant_and_reason(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=90, file=io.StringIO(), record=True)
    console.print(bench_report.tables(report))
    text = console.export_text()
    assert text.count("\n lora ") == 2 and text.count("\n base-again ") == 2
    assert "prefill 8, 3 rounds" in text and "merged: not timed: no --merged" in text
    assert "…" not in text  # no figure is cut short


def test_a_classifier_is_timed_without_decoding(exported: Get) -> None:
    report = bench(exported("bert"), **QUICK, only=["branch", "lora"])
    (work,) = report["work"]
    assert work["name"] == "forward 8" and set(work["variants"]) == {"base", "branch", "lora"}
    assert set(report["variants"]) == {"base", "branch", "lora"}


def test_torch_graphs_and_several_threads(exported: Get) -> None:
    report = bench(exported("gpt2"), **{**QUICK, "threads": 2}, adapter="b", only=["branch", "lora"])
    assert report["adapter"] == "b"
    for work in report["work"]:
        assert "processor_ratio" not in work["variants"]["branch"]  # other threads work as well
    only_decoding = bench(exported("gpt2"), **{**QUICK, "prefill": []}, only=["empty"])
    assert [work["name"] for work in only_decoding["work"]] == ["decode at 4"]


def test_a_merge_beside_it(tiny_model: Get, tiny_adapter: Get, exported: Get, tmp_path: Path) -> None:
    merged = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "merged")
    report = bench(exported("llama"), **QUICK, merged=merged, only=["merged"])
    assert report["variants"]["merged"] == {"what": VARIANTS["merged"], "parameters": 0, "bytes": 0}
    with pytest.raises(InputError, match=r"merged into the weights, which costs nothing.* as --merged .*merged"):
        bench(merged, **QUICK)
    with pytest.raises(InputError, match=r"--merged .*: give the output folder of diablo-export merge, in ONNX"):
        bench(exported("llama"), **QUICK, merged=exported("llama"))


def test_a_merge_of_another_model_is_refused(tiny_model: Get, tiny_adapter: Get, exported: Get, tmp_path: Path) -> None:
    merged = exports.merged(tiny_model("qwen2"), tiny_adapter("qwen2"), tmp_path / "merged")
    with pytest.raises(InputError, match=r"--merged .*: was made of .*qwen2.*, and .* of .*llama"):
        bench(exported("llama"), **QUICK, merged=merged, only=["merged"])


def test_lengths_by_default_are_those_that_the_model_can_take(exported: Get) -> None:
    report = bench(exported("llama"), rounds=1, past=None, threads=1, only=["empty"])  # 256 positions
    assert [work["name"] for work in report["work"]] == ["prefill 128"]


def test_without_a_library_the_reason_is_said(exported: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_library", lambda: None)
    report = bench(exported("llama"), **QUICK, only=["branch-kernels"])
    assert report["variants"]["branch-kernels"]["skipped"] == "no kernel library found"
    assert report["environment"]["kernels"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": [8, 300]}, "cannot run prefill 300; lengths go from 1 to 256 tokens"),
        ({"past": 256}, "cannot run decode at 256; .* the new one included"),
        ({"prefill": [0]}, "cannot run prefill 0"),
        ({"prefill": [], "past": None}, "nothing to time"),
        ({"adapter": "c"}, "--adapter c: no such adapter in .*; there are a, b"),
        ({"only": ["kernels"]}, "--only kernels: no such variant; there are base, base-again"),
        ({"rounds": 0}, "rounds is 0"),
        ({"provider": "Abacus"}, "--provider Abacus: is not in this onnxruntime, which has .*CPUExecutionProvider"),
        ({"png": "/nowhere/r.png"}, "--png /nowhere/r.png: no such folder"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, exported: Get) -> None:
    with pytest.raises(InputError, match=message):
        bench(exported("llama"), **{**QUICK, **options})


def test_folders_that_cannot_be_timed(exported: Get, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        bench(tmp_path / "nothing", **QUICK)
    with pytest.raises(InputError, match=r"missing; .* was not made by diablo-export"):
        bench(tmp_path, **QUICK)
    web = exports.copy(exported("llama"), tmp_path / "web")
    manifest = json.loads((web / MANIFEST).read_text())
    for entry in manifest["adapters"]:
        entry["file"] = f"adapters/{entry['name']}.safetensors"
    (web / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="exported for the web"):
        bench(web, **QUICK)
    (web / "model.onnx").unlink()
    with pytest.raises(InputError, match="holds neither"):
        bench(web, **QUICK)


def test_a_broken_base_is_an_error(exported: Get, tmp_path: Path) -> None:
    out = exports.copy(exported("llama"), tmp_path / "out")
    data = out / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"onnxruntime .* cannot load it"):
        bench(out, **QUICK, only=["lora"])
