from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.converters.onnx_adapters import write_onnx_adapter
from diablo_export.errors import CheckFailed, DataError, InputError
from diablo_export.manifest import MANIFEST, read_manifest
from diablo_export.measure.parity import parity
from diablo_export.measure.report import require_pass
from diablo_export.runtime import load_adapter
from tests import exports, tiny
from tests.exports import SMALL

Get = Callable[[str], Path]

KEYS = [
    "format_version", "verdict", "checks", "logits", "kl", "top1_agreement", "perplexity", "decode", "adapter",
    "modules", "first_divergent_module", "environment", "hashes", "distribution", "texts",
]  # fmt: skip
FLOAT_CHECKS = {
    "files", "sources", "runs", "untouched", "logits.max_abs", "kl.max", "decode.max_abs", "decode.cache",
    "decode.diverged", "padding.right", "adapter.alive", "adapter.survival_gain.error",
}  # fmt: skip


@pytest.fixture(scope="module")
def float_merge(tiny_model: Get, tiny_adapter: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("float") / "out"
    return exports.merged(tiny_model("llama"), tiny_adapter("llama"), out)


@pytest.fixture(scope="module")
def int8_merge(tiny_model: Get, tiny_adapter: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    return exports.merged(tiny_model("llama"), tiny_adapter("llama"), out, quantize="int8")


@pytest.fixture(scope="module")
def second_adapter(tiny_model: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter of the same base, with other blocks of another size on fewer modules."""
    folder = tmp_path_factory.mktemp("second") / "adapter"
    return tiny.make_adapter(tiny_model("llama"), folder, num_blocks=8, seed=7, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def branches(
    tiny_model: Get, tiny_adapter: Get, second_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("branches") / "out"
    return exports.branched(tiny_model("llama"), {"first": tiny_adapter("llama"), "second": second_adapter}, out)


# what a good export looks like


def test_float_merge_passes_and_the_report_has_the_format_s_keys(float_merge: Path) -> None:
    report = parity(float_merge, **SMALL)
    assert report["verdict"] == "pass"
    assert list(report) == KEYS
    assert set(exports.checks(report)) == FLOAT_CHECKS
    assert all(list(check) == ["name", "value", "limit", "pass"] for check in report["checks"])
    assert list(report["logits"]) == ["max_abs", "mean_abs", "cosine", "sqnr_db"]
    assert list(report["kl"]) == ["mean", "p99", "max"]
    assert list(report["perplexity"]) == ["tuned", "exported", "base"]
    assert list(report["decode"]) == ["steps", "first_divergence", "max_abs"]
    assert report["decode"]["steps"] == 6 and report["decode"]["first_divergence"] is None
    assert list(report["adapter"]) == ["alive", "survival_gain", "survival_cosine"]
    assert report["adapter"]["alive"] is True
    assert (report["modules"], report["first_divergent_module"]) == ([], None)
    assert report["perplexity"]["base"] != pytest.approx(report["perplexity"]["tuned"], rel=1e-3)
    assert set(report["hashes"]["files"]) == set(read_manifest(float_merge)["files"])
    assert report["environment"]["provider"] == "CPUExecutionProvider"
    require_pass(report, float_merge)
    assert json.loads((float_merge / "parity.json").read_text()) == report


def test_two_runs_give_the_same_report(int8_merge: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"the cat number {i} sat on the mat"}) + "\n" for i in range(30)))
    bounds = {
        **SMALL,
        "threads": 2,
        "data": data,
        "samples": 5,
    }  # two threads share sums in one way
    first, again, other = (parity(int8_merge, **bounds, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["logits"] != other["logits"]  # other examples were drawn
    assert first["environment"]["sequences"] == 5


def test_a_quantized_merge_is_judged_by_survival(int8_merge: Path) -> None:
    report = parity(int8_merge, **SMALL)
    assert report["verdict"] == "pass", exports.failed(report)
    held = exports.checks(report)
    assert {"adapter.survival_gain", "kl.ratio", "top1_agreement.drop"} <= set(held)
    assert "logits.max_abs" not in held
    limit = {check["name"]: check["limit"] for check in report["checks"]}["top1_agreement.drop"]
    assert 0.05 < limit < 0.25  # a hundred positions say little about a share
    asked = parity(int8_merge, limit={"top1_agreement.drop": 0.3}, **SMALL)
    assert {check["name"]: check["limit"] for check in asked["checks"]}["top1_agreement.drop"] == 0.3
    # 8-bit codes lose under a hundredth; and something must be lost, or the base was not rebuilt in int8
    assert 0.98 < report["adapter"]["survival_gain"] < 1.02
    assert report["logits"]["max_abs"] > 1e-4


def test_every_adapter_of_a_branch_export_is_checked(branches: Path) -> None:
    report = parity(branches, **SMALL)
    assert report["verdict"] == "pass", exports.failed(report)
    names = FLOAT_CHECKS - {"untouched"} | {"adapter.bound"}  # nothing was merged, and adapters are files
    assert set(exports.checks(report)) == {f"{name}@{adapter}" for name in names for adapter in ("first", "second")}
    assert report["environment"]["adapters"] == ["first", "second"]
    only = parity(branches, adapter=["second"], **SMALL)
    assert set(exports.checks(only)) == names
    assert only["environment"]["adapter"] == "second"


def test_an_adapter_that_io_binding_leaves_out_is_caught(branches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault is onnxruntime's own: what is in the run options does not reach a binding."""
    bind = runtime.bind
    monkeypatch.setattr(runtime, "bind", lambda session, feeds, _, outputs: bind(session, feeds, None, outputs))
    assert exports.failed(parity(branches, adapter=["first"], **SMALL)) == {"adapter.bound"}


def test_a_branch_that_is_not_the_base_at_scale_zero_is_not_alive(
    branches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: whenever blocks are fed, the operator's function also adds a little of its own."""
    monkeypatch.setattr(runtime, "find_library", lambda: None)  # the function body runs, not a kernel
    assert parity(branches, adapter=["first"], **SMALL)["adapter"]["alive"] is True
    out = exports.copy(branches, tmp_path / "out")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    (body,) = model.functions
    last = next(node for node in body.node if body.output[0] in node.output)
    last.output[:] = ["whole"]
    node = onnx.helper.make_node
    extra = [
        node("Size", [body.input[1]], ["count"]),
        node("CastLike", ["count", "whole"], ["as_float"]),
        node("Constant", [], ["small"], value_float=1e-6),
        node("Mul", ["as_float", "small"], ["left_behind"]),
        node("Add", ["whole", "left_behind"], [body.output[0]]),
    ]
    body.node.extend(extra)
    onnx.save(model, out / "model.onnx")
    assert parity(exports.announce(out), adapter=["first"], **SMALL)["adapter"]["alive"] is False


def test_a_hugging_face_merge_is_compared_torch_against_torch(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    out = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out", format="hf")
    report = parity(out, **SMALL)
    assert report["verdict"] == "pass", exports.failed(report)
    assert report["environment"]["provider"] == "torch"
    wrong = exports.pretend(
        exports.copy(out, tmp_path / "wrong"), exports.scaled(tiny_adapter("llama"), tmp_path / "a", 2)
    )
    assert {"logits.max_abs", "adapter.survival_gain.error"} <= exports.failed(parity(wrong, **SMALL))


# planted faults


@pytest.mark.parametrize("scale", [0.0, 2.0, 0.9, -1.0], ids=["dropped", "doubled", "wrong scale", "wrong sign"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_an_adapter_that_did_not_arrive_as_trained_fails(
    scale: float, quantize: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    # weak blocks: a network bends under strong ones, and twice as much of them is not twice the effect
    true = exports.scaled(tiny_adapter("llama"), tmp_path / "true", 0.2)
    wrong = exports.scaled(true, tmp_path / "wrong", scale)
    out = exports.merged(tiny_model("llama"), wrong, tmp_path / "out", quantize=quantize)
    report = parity(exports.pretend(out, true), **SMALL)
    expected = {"adapter.survival_gain.error"} if scale == 2 or quantize == "none" else {"adapter.survival_gain"}
    assert expected <= exports.failed(report)
    assert exports.checks(report)["adapter.alive"] is (scale != 0)
    assert report["adapter"]["survival_gain"] == pytest.approx(scale, abs=0.25)  # it still bends a little
    with pytest.raises(
        CheckFailed, match=r"parity failed: .*adapter\.survival_gain(\.error)? .* \(limit [≤≥] 0\.\d+\)"
    ):
        require_pass(report, out)


def test_a_strong_adapter_that_arrives_twice_is_caught_by_kl_where_gain_is_blind(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    """Layer norms bound what strong blocks can do: at twice the strength the logits' gain is still near 1."""
    true = tiny_adapter("llama")
    wrong = exports.scaled(true, tmp_path / "wrong", 2)
    out = exports.merged(tiny_model("llama"), wrong, tmp_path / "out", quantize="int8")
    report = parity(exports.pretend(out, true), **SMALL)
    assert 0.75 < report["adapter"]["survival_gain"] < 1.25
    assert "kl.ratio" in exports.failed(report)


def test_a_branch_with_other_blocks_fails(branches: Path, tmp_path: Path) -> None:
    out = exports.copy(branches, tmp_path / "out")
    file = out / "adapters" / "second.onnx_adapter"
    values = {name: value * value.dtype.type(1.5) for name, value in load_adapter(file).values().items()}
    write_onnx_adapter(file, values)
    report = parity(exports.announce(out), **SMALL)
    assert {"logits.max_abs@second", "adapter.survival_gain.error@second"} <= exports.failed(report)
    assert not any(name.endswith("@first") for name in exports.failed(report))
    assert report["environment"]["adapter"] == "second"  # the figures are those of the adapter that does worst


def test_a_dead_adapter_is_not_alive(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """Zero blocks: the export is faithful, but tuned is the base, and nobody wants to ship that."""
    dead = exports.scaled(tiny_adapter("llama"), tmp_path / "dead", 0)
    out = exports.merged(tiny_model("llama"), dead, tmp_path / "out")
    report = parity(out, **SMALL)
    assert exports.failed(report) == {"adapter.alive", "adapter.survival_gain.error"}
    assert report["adapter"] == {"alive": False, "survival_gain": None, "survival_cosine": None}


def test_a_changed_byte_fails_and_is_named(float_merge: Path, tmp_path: Path) -> None:
    out = exports.copy(float_merge, tmp_path / "out")
    exports.flip_byte(out / "tokenizer_config.json")  # the trailing newline or brace: harmless to the numbers
    exports.flip_byte(out / "model.onnx.data", 5)
    report = parity(out, **SMALL)
    assert "files" in exports.failed(report)
    with pytest.raises(CheckFailed, match=r"files 2 \(limit ≤ 0\).*model\.onnx\.data, tokenizer_config\.json"):
        require_pass(report, out)


def test_a_file_that_is_gone_or_new_fails(float_merge: Path, tmp_path: Path) -> None:
    out = exports.copy(float_merge, tmp_path / "out")
    (out / "extra.bin").write_bytes(b"?")
    (out / "generation_config.json").unlink(missing_ok=True)
    report = parity(out, **SMALL)
    assert "extra.bin" in report["hashes"]["changed"]
    assert exports.failed(report) == {"files"}


def test_a_base_that_changed_since_is_named(tiny_model: Get, float_merge: Path, tmp_path: Path) -> None:
    """Its norms differ, which no adapter's fingerprint sees; its hash does."""
    from safetensors.numpy import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.01)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    report = parity(float_merge, model=base, **SMALL)
    assert {"sources", "logits.max_abs"} <= exports.failed(report)
    assert report["hashes"]["sources_changed"] == ["base:model.safetensors"]


def test_a_merge_that_touched_more_than_its_blocks_fails(int8_merge: Path, tmp_path: Path) -> None:
    out = exports.copy(int8_merge, tmp_path / "out")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    entry = read_manifest(out)["modules"][0]
    tensor = next(t for t in model.graph.initializer if t.name == entry["weight"])
    offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
    exports.flip_byte(out / "model.onnx.data", offset + tensor.dims[1] * tensor.dims[2] - 1)  # row 0, last input
    report = parity(exports.announce(out), **SMALL)
    assert exports.failed(report) == {"untouched"}


def test_decoding_that_goes_wrong_is_caught_where_prefill_is_perfect(float_merge: Path, tmp_path: Path) -> None:
    out = exports.shrink_cached_values(exports.copy(float_merge, tmp_path / "out"), 0.9)
    report = parity(out, **SMALL)
    assert {"decode.max_abs", "decode.cache"} <= exports.failed(report)
    assert exports.checks(report)["logits.max_abs"]


def test_a_quantized_cache_fault_is_caught_too(int8_merge: Path, tmp_path: Path) -> None:
    out = exports.shrink_cached_values(exports.copy(int8_merge, tmp_path / "out"), 0.5)
    assert exports.failed(parity(out, **SMALL)) == {"decode.cache"}


def test_a_model_that_onnxruntime_refuses_is_a_failed_check(float_merge: Path, tmp_path: Path) -> None:
    out = exports.copy(float_merge, tmp_path / "out")
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes()[:1000])
    report = parity(out, **SMALL)
    assert exports.failed(report) == {"files", "runs"}
    assert list(report) == KEYS and report["logits"] is None
    with pytest.raises(CheckFailed, match=r"runs 0 \(limit ≥ 1\).*cannot load it"):
        require_pass(report, out)
    assert json.loads((out / "parity.json").read_text())["verdict"] == "fail"


def test_a_batch_whose_rows_mix_is_caught_where_single_sequences_are_perfect(float_merge: Path, tmp_path: Path) -> None:
    """The planted fault: a hundredth of what the rows of a batch have in common leaks into each."""
    good = parity(float_merge, **SMALL)["distribution"]
    assert good["padding"]["right"] < 1e-4
    assert good["padding"]["left"] is None  # GroupQueryAttention counts positions from the left
    out = exports.copy(float_merge, tmp_path / "out")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["own" if name == "logits" else name for name in node.output]
    make = onnx.helper.make_node
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "rows"))
    model.graph.node.extend([
        make("ReduceMean", ["own", "rows"], ["shared"], keepdims=1),
        make("Sub", ["shared", "own"], ["others"]),
        make("Constant", [], ["little"], value_float=0.01),
        make("Mul", ["others", "little"], ["leak"]),
        make("Add", ["own", "leak"], ["logits"]),
    ])  # fmt: skip
    onnx.save(model, out / "model.onnx")
    assert exports.failed(parity(exports.announce(out), **SMALL)) == {"padding.right"}


def test_short_and_long_sequences_are_told_apart(float_merge: Path) -> None:
    report = parity(float_merge, **SMALL)
    parts = report["distribution"]["by_length"]
    assert len(parts) > 1
    assert sum(part["positions"] for part in parts) == report["environment"]["tokens"]
    assert sum(part["sequences"] for part in parts) == report["environment"]["sequences"]
    whole = sum(part["kl_mean"] * part["positions"] for part in parts) / report["environment"]["tokens"]
    assert whole == pytest.approx(report["kl"]["mean"], rel=1e-9)  # float64 sums in another order
    assert all(one["tokens"][1] < two["tokens"][0] for one, two in itertools.pairwise(parts))


# limits and bad input


def test_limits_override_and_add(float_merge: Path) -> None:
    report = parity(float_merge, limit=["logits.max_abs=1e-9", "perplexity.ratio=1.5"], **SMALL)
    assert exports.failed(report) == {"logits.max_abs"}
    assert exports.checks(report)["perplexity.ratio"]


def test_a_limit_on_what_is_not_measured_is_refused(float_merge: Path) -> None:
    with pytest.raises(InputError, match=r"--limit accuracy\.drop: not measured here; there are: .*decode\.cache"):
        parity(float_merge, limit={"accuracy.drop": 0.1}, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": ["speed=3"]}, r"(?s)--limit speed=3: no such figure.*kl\.mean <= "),
        ({"limit": ["kl.mean=low"]}, r"--limit kl\.mean=low: write NAME=VALUE with a number"),
        ({"adapter": ["nobody"]}, r"--adapter nobody: this folder has the adapters adapter"),
        ({"adapter": ["adapter=/nowhere/at/all"]}, r"adapter folders that are not there: adapter \(/nowhere"),
        ({"model": "/nowhere/at/all"}, r"/nowhere/at/all: no such model folder"),
        ({"steps": 0}, r"--steps 0, .* each must be 1 or more"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str, float_merge: Path) -> None:
    with pytest.raises(InputError, match=message):
        parity(float_merge, **{**SMALL, **options})


def test_bad_data_is_named(float_merge: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no examples"):
        parity(float_merge, data=tmp_path / "empty.jsonl", **SMALL)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"(?s)bad\.jsonl.*line 2"):
        parity(float_merge, data=tmp_path / "bad.jsonl", **SMALL)


def test_folders_that_are_no_export(tmp_path: Path, float_merge: Path) -> None:
    with pytest.raises(InputError, match=r"diablo_export\.json: missing"):
        parity(tmp_path)
    out = exports.copy(float_merge, tmp_path / "out")
    (out / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"holds neither model\.onnx nor config\.json with \*\.safetensors"):
        parity(out, **SMALL)
    manifest = read_manifest(out) | {"adapters": []}
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="names no adapter"):
        parity(out, **SMALL)


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_adapter_with_a_head_of_its_own_for_a_base_that_ties_it(
    stored: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    """The embeddings stay, in torch and in the graph, whichever of the two names the base stores them under."""
    base, adapter = (
        shutil.copytree(tiny_model("llama-tied"), tmp_path / "base"),
        Adapter.load(tiny_adapter("llama-tied")),
    )
    tensors = load_file(base / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, stored: table}, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "a").mkdir()
    dataclasses.replace(adapter, saved={"lm_head.weight": table * np.float32(1.5)}).save(tmp_path / "a")
    for out in (
        exports.merged(base, tmp_path / "a", tmp_path / "hf", format="hf"),
        exports.branched(base, {"a": tmp_path / "a"}, tmp_path / "branch"),
        exports.merged(base, tmp_path / "a", tmp_path / "int4", quantize="int4", method="rtn", group_size=16),
    ):
        report = parity(out, model=base, adapter=[str(tmp_path / "a")], **{**SMALL, "modules": True})
        assert report["first_divergent_module"] is None
        assert report["verdict"] == "pass" or out.name == "int4"  # rounded to the nearest, and never trained
