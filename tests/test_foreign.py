"""Exports of other programs, judged by parity: the whole ones pass, those that lost something are told what."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import Result
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from diablo_export.converters.onnx_adapters import write_onnx_adapter
from diablo_export.errors import AdapterError, CheckFailed, InputError
from diablo_export.measure.parity import parity
from diablo_export.measure.peft_tuned import class_names
from diablo_export.measure.report import require_pass
from diablo_export.measure.verify import verify
from tests import exports, foreign, tiny
from tests.exports import SMALL
from tests.foreign import judge, put_into_a_file

pytest.importorskip("peft")
Get = Callable[[str], Path]
# files and sources have nothing to be held against, merged weights are not looked at
CHECKS = {
    "runs", "logits.max_abs", "kl.max", "padding.right", "decode.max_abs", "decode.cache", "decode.diverged",
    "adapter.alive", "adapter.whole", "adapter.survival_gain.error",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Get) -> Path:
    return tiny_model("llama")


def test_the_builder_s_lora_passes(model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]) -> None:
    report = judge(built("lora"), model, peft_adapters["lora"])
    assert report["verdict"] == "pass", exports.failed(report)
    assert set(exports.checks(report)) == CHECKS
    assert report["environment"]["adapter_kind"] == "LoRA"
    assert (report["environment"]["precision"], report["environment"]["exported_base"]) == ("fp32", "torch")
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= set(report["hashes"]["files"])
    assert json.loads((built("lora") / "parity.json").read_text()) == report
    again = judge(built("lora") / "model.onnx", model, peft_adapters["lora"])  # the file, in place of its folder
    assert again == report
    assert (built("lora") / "model.parity.json").is_file()


def test_the_builder_s_dora_fails_and_is_told_what_it_lost(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]
) -> None:
    """The builder leaves out DoRA's magnitudes, and exits with 0."""
    report = judge(built("dora"), model, peft_adapters["dora"])
    assert {"adapter.whole", "logits.max_abs", "adapter.survival_gain.error"} <= exports.failed(report)
    assert exports.checks(report)["adapter.alive"]  # something of it is there: that is what makes it hard to see
    with pytest.raises(CheckFailed, match="the export is the model without DoRA's magnitudes"):
        require_pass(report, built("dora"))


def test_lost_magnitudes_are_seen_through_the_noise_of_a_quantized_export(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]
) -> None:
    report = judge(built("dora", "int8"), model, peft_adapters["dora"])
    assert report["environment"]["precision"] == "int8"
    assert "adapter.whole" in exports.failed(report)
    assert "without DoRA's magnitudes" in report["environment"]["fault"]


def test_dora_that_was_merged_passes(model: Path, peft_adapters: dict[str, Path], tmp_path: Path) -> None:
    merged = foreign.merge_peft(model, peft_adapters["dora"], tmp_path / "merged")
    report = judge(foreign.build(merged, tmp_path / "out"), model, peft_adapters["dora"])
    assert report["verdict"] == "pass", exports.failed(report)


@pytest.mark.parametrize(
    ("adapter", "changes", "lost"),
    [
        ("rslora", {"use_rslora": False}, "the strength of rank-stabilized LoRA"),
        ("alpha", {"alpha_pattern": {}}, "alpha_pattern, the strength of single modules"),
    ],
)
def test_strengths_that_got_lost_are_named(
    adapter: str, changes: dict[str, Any], lost: str, model: Path, peft_adapters: dict[str, Path], tmp_path: Path
) -> None:
    lossy = tmp_path / "lossy"
    shutil.copytree(peft_adapters[adapter], lossy)
    config = json.loads((lossy / "adapter_config.json").read_text()) | changes
    (lossy / "adapter_config.json").write_text(json.dumps(config))
    out = foreign.build(foreign.merge_peft(model, lossy, tmp_path / "merged"), tmp_path / "out")
    report = judge(out, model, peft_adapters[adapter])
    assert "adapter.whole" in exports.failed(report)
    assert report["environment"]["fault"] == f"the export is the model without {lost}: that got lost when it was made"


def test_an_export_of_the_base_alone_says_that_the_adapter_is_not_in_it(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]
) -> None:
    report = judge(built(), model, peft_adapters["lora"])
    assert {"adapter.alive", "adapter.whole", "logits.max_abs"} <= exports.failed(report)
    assert report["adapter"]["survival_gain"] == pytest.approx(0, abs=1e-4)  # float32 noise
    with pytest.raises(CheckFailed, match="the export is the model without the adapter"):
        require_pass(report, built())


def test_another_adapter_is_not_taken_for_a_part_of_this_one(
    model: Path, peft_adapters: dict[str, Path], tmp_path: Path, built: Callable[..., Path]
) -> None:
    other = foreign.make_peft(model, tmp_path / "other", seed=9)
    report = judge(built("lora"), model, other)
    assert {"logits.max_abs", "adapter.survival_gain.error"} <= exports.failed(report)
    assert "the export is the model" not in report["environment"].get("fault", "")


@pytest.mark.parametrize("right", [True, False], ids=["this one", "base alone"])
def test_quantized_exports_are_held_against_the_same_program_s_base(
    right: bool, model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    merged = foreign.merge_peft(model, peft_adapters["lora"], tmp_path / "merged") if right else model
    # 8 bits: random weights are hard to round, and 4 take half of this effect
    out = foreign.build(merged, tmp_path / "out", "int8")
    base = foreign.build(model, tmp_path / "base", "int8")
    alone = judge(out, model, peft_adapters["lora"])
    assert alone["environment"]["precision"] == "int8"
    assert alone["environment"]["exported_base"] == "torch"
    assert "kl.ratio" not in exports.checks(alone)
    beside = judge(out, model, peft_adapters["lora"], exported_base=base)
    assert {"kl.ratio", "top1_agreement.drop", "adapter.survival_gain"} <= set(exports.checks(beside))
    for report in (alone, beside):
        assert report["verdict"] == ("pass" if right else "fail"), (exports.failed(report), report["checks"])


def test_an_adapter_in_its_own_file_is_fed(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    out = exports.copy(built("lora"), tmp_path / "out")
    for report in ("parity.json", "model.parity.json"):
        (out / report).unlink(missing_ok=True)
    values = put_into_a_file(out / "model.onnx", out / "poems.onnx_adapter")
    report = judge(out, model, peft_adapters["lora"])
    assert report["verdict"] == "pass", report["environment"]
    assert report["environment"]["exported_base"] == str(out / "model.onnx")
    write_onnx_adapter(out / "poems.onnx_adapter", {name: value * np.float32(0) for name, value in values.items()})
    dead = judge(out, model, peft_adapters["lora"])
    assert "adapter.alive" in exports.failed(dead)
    assert dead["environment"]["fault"].startswith("the export is the model without the adapter")
    write_onnx_adapter(out / "prose.onnx_adapter", values)
    with pytest.raises(InputError, match=r"holds poems\.onnx_adapter, prose\.onnx_adapter; say which one it is"):
        judge(out, model, peft_adapters["lora"])
    named = parity(out, model=model, adapter=[f"prose={peft_adapters['lora']}"], **SMALL)
    assert named["verdict"] == "pass", exports.failed(named)


def test_a_diablo_adapter_is_judged_in_others_exports_too(
    model: Path, tiny_adapter: Get, tmp_path: Path, built: Callable[..., Path]
) -> None:
    from diablo_export.converters.merge import merge

    merge(model, tiny_adapter("llama"), tmp_path / "merged", format="hf")
    report = judge(foreign.build(tmp_path / "merged", tmp_path / "out"), model, tiny_adapter("llama"))
    assert report["verdict"] == "pass", exports.failed(report)
    assert report["environment"]["adapter_kind"] == "DIABLO"
    assert "adapter.whole" in exports.failed(judge(built(), model, tiny_adapter("llama")))


@pytest.mark.slow  # three exports by torch
def test_plain_torch_exports_with_free_and_with_fixed_length(
    model: Path, peft_adapters: dict[str, Path], tmp_path: Path
) -> None:
    merged = foreign.merge_peft(model, peft_adapters["lora"], tmp_path / "merged")
    out = foreign.export_with_torch(merged, tmp_path / "free" / "m.onnx").parent
    free = judge(out, model, peft_adapters["lora"], modules=True)
    assert free["verdict"] == "pass", exports.failed(free)
    assert (len(free["modules"]), free["environment"]["modules_not_found"]) == (15, {})
    assert not {"decode.max_abs", "padding.right"} & set(exports.checks(free))  # no cache, no attention mask
    assert free["decode"] is None
    out = foreign.export_with_torch(merged, tmp_path / "fixed.onnx", 24)
    fixed = judge(out, model, peft_adapters["lora"], modules=True)
    assert fixed["verdict"] == "pass" and len(fixed["modules"]) == 15, exports.failed(fixed)
    base = foreign.export_with_torch(model, tmp_path / "base" / "m.onnx")
    with pytest.raises(CheckFailed, match="the export is the model without the adapter"):
        require_pass(judge(base, model, peft_adapters["lora"]), base)


@pytest.mark.slow  # an export by torch, and what is merged into it
def test_a_merge_into_an_export_of_a_fixed_length(model: Path, tiny_adapter: Get, tmp_path: Path) -> None:
    """Torch fixes the length where nobody says otherwise, and names outputs as it likes."""
    from diablo_export.converters.merge import merge

    given = foreign.export_with_torch(model, tmp_path / "given" / "model.onnx", 24)
    graph = ir.load(given)
    graph.graph.outputs[0].name = "linear_14"
    ir.save(graph, given)
    merge(given, tiny_adapter("llama"), tmp_path / "merged")
    report = parity(tmp_path / "merged", certificate=True, max_tokens=160, threads=1)
    assert report["verdict"] == "pass" and len(report["modules"]) == 14, exports.failed(report)
    assert verify(tmp_path / "merged")["verdict"] == "pass"
    quantizer = MatMulNBitsQuantizer(onnx.load(given), bits=8, block_size=32, is_symmetric=True)
    quantizer.process()
    (tmp_path / "int8").mkdir()
    onnx.save(quantizer.model.model, tmp_path / "int8" / "model.onnx")
    manifest = merge(tmp_path / "int8", tiny_adapter("llama"), tmp_path / "measured", method="refit", max_seconds=5)
    assert manifest["survival"]["passed"]


@pytest.mark.slow  # an export by torch
def test_an_adapter_beside_its_base_in_a_plain_torch_export(
    model: Path, peft_adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = foreign.export_with_torch(model, tmp_path / "dora" / "m.onnx", adapter=peft_adapters["dora"]).parent
    report = judge(out, model, peft_adapters["dora"], modules=True)
    assert report["verdict"] == "pass" and len(report["modules"]) == 15, exports.failed(report)


def test_float16_exports_are_held_to_float16(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path]
) -> None:
    report = judge(built("lora", "fp16"), model, peft_adapters["lora"])
    assert report["verdict"] == "pass", exports.failed(report)
    assert report["environment"]["precision"] == "fp16"
    assert {"logits.sqnr_db", "adapter.survival_gain.error"} <= set(exports.checks(report))
    assert report["logits"]["max_abs"] > 1e-4  # it is no float32 under another name
    lost = judge(built("dora", "fp16"), model, peft_adapters["dora"])
    assert {"adapter.whole", "logits.sqnr_db"} <= exports.failed(lost)
    assert "the export is the model without DoRA's magnitudes" in lost["environment"]["fault"]


@pytest.mark.slow  # two exports by torch
def test_a_classifier_with_lora_and_its_own_head(tiny_model: Get, tmp_path: Path) -> None:
    bert = tiny_model("bert")
    adapter = foreign.make_peft(bert, tmp_path / "lora", **foreign.CLASSIFIER)
    merged = foreign.merge_peft(bert, adapter, tmp_path / "merged")
    data = tmp_path / "data.jsonl"
    lines = [{"text": f"the dog {'sat ' * i}", "label": str(i % 2)} for i in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = foreign.export_with_torch(merged, tmp_path / "out" / "m.onnx").parent
    report = judge(out, bert, adapter, data=data, modules=True)
    assert report["verdict"] == "pass", exports.failed(report)
    assert "classifier" in {row["name"] for row in report["modules"]}  # PEFT's copy of it, by the model's name
    assert report["environment"]["modules_not_found"] == {}
    assert list(report["accuracy"]) == ["tuned", "exported", "base"] and "decode" not in report
    base = foreign.export_with_torch(bert, tmp_path / "base" / "m.onnx")
    lost = judge(base, bert, adapter, data=data)
    assert {"adapter.whole", "logits.max_abs"} <= exports.failed(lost)


# certificates


@pytest.mark.parametrize("own_file", [False, True], ids=["in the graph", "in a file of its own"])
def test_another_program_s_export_is_certified_and_verified(
    own_file: bool, model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    out = exports.copy(built("lora"), tmp_path / "out")
    (out / "model.onnx").rename(out / "decoder.onnx")
    if own_file:
        put_into_a_file(out / "decoder.onnx", out / "poems.onnx_adapter")
    report = judge(out, model, peft_adapters["lora"], certificate=True)
    assert report["verdict"] == "pass", exports.failed(report)
    name = peft_adapters["lora"].name
    found = verify(out, threads=1)
    assert [check["name"] for check in found["checks"]] == ["files", "runs", f"drift@{name}", f"distance@{name}"]
    assert found["verdict"] == "pass", found
    changed = "poems.onnx_adapter" if own_file else "decoder.onnx"
    exports.flip_byte(out / changed, 5000)
    assert verify(out)["environment"]["changed"] == [changed]
    judge(out, model, peft_adapters["lora"])  # another look takes the certificate away
    with pytest.raises(InputError, match=r"has no certificate\.json"):
        verify(out)


@pytest.mark.slow  # a process of its own, which loads torch again
def test_as_its_users_call_the_builder(
    model: Path, peft_adapters: dict[str, Path], tmp_path: Path, run: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        model,
        "-o",
        out,
        "-p",
        "fp32",
        "-e",
        "cpu",
    ]
    command += ["--extra_options", f"adapter_path={peft_adapters['dora']}"]
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    given = ("--model", model, "--adapter", peft_adapters["dora"], "--max-tokens", 160, "--steps", 6)
    result = run("parity", out, *given, "-q")
    assert result.exit_code == 1
    assert "the export is the model without DoRA's magnitudes" in result.stderr


# what cannot be judged


def test_bad_input_is_named(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    out = built("lora")
    with pytest.raises(
        InputError, match=r"has no diablo_export\.json, .* give --model and one --adapter PATH \(0 given\)"
    ):
        parity(out, model=model)
    with pytest.raises(InputError, match=r"model\.onnx: --certificate is for folders"):
        judge(out / "model.onnx", model, peft_adapters["lora"], certificate=True)
    with pytest.raises(AdapterError, match=r"nowhere.*adapter_config\.json"):
        judge(out, model, tmp_path / "nowhere")
    two = exports.copy(out, tmp_path / "two")
    (two / "model.onnx").rename(two / "a.onnx")
    shutil.copy(two / "a.onnx", two / "b.onnx")
    with pytest.raises(InputError, match=r"holds 2 ONNX files, a\.onnx, b\.onnx; give one file"):
        judge(two, model, peft_adapters["lora"])
    (two / "a.onnx").write_bytes(b"no onnx at all")
    with pytest.raises(InputError, match=r"a\.onnx: cannot be read as ONNX"):
        judge(two / "a.onnx", model, peft_adapters["lora"])


def test_an_adapter_of_another_base_or_of_prompts_is_refused(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny.make_model("llama", tmp_path / "other", intermediate_size=128)
    with pytest.raises(AdapterError, match="PEFT cannot put this LoRA adapter on"):
        judge(built("lora"), other, peft_adapters["lora"])
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(AdapterError, match="peft_type is 'PREFIX_TUNING'; compared are adapters of a model's layers"):
        judge(built("lora"), model, prompts)


def test_weights_that_the_adapter_lacks_are_an_error(
    model: Path, peft_adapters: dict[str, Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    partial = tmp_path / "partial"
    shutil.copytree(peft_adapters["lora"], partial)
    tensors = load_file(partial / "adapter_model.safetensors")
    save_file({n: v for n, v in tensors.items() if "down_proj" not in n}, partial / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"missing adapter keys.*down_proj"):
        judge(built("lora"), model, partial)


def test_an_exported_base_is_for_foreign_exports(exported: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--exported-base .*: is for exports of other programs"):
        parity(exported("llama"), exported_base=tmp_path, **SMALL)


def test_a_kept_model_is_no_surprise_in_the_help(run: Callable[..., Result]) -> None:
    help_ = run("parity", "--help").output
    assert "--exported-base" in help_ and "diablo-export parity model.onnx --model M --adapter lora" in help_


def test_class_names_are_in_the_order_of_their_numbers() -> None:
    names = {0: "no", 10: "ten", 2: "two"}  # as a config.json whose keys were sorted as text is read
    assert class_names(SimpleNamespace(config=SimpleNamespace(id2label=names))) == ["no", "two", "ten"]  # type: ignore[arg-type]
