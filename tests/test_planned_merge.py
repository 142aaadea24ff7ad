"""Merges by a plan: what is decided, that the file holds it, that it can be done again, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import Result
from transformers import AutoTokenizer

from diablo_export import runtime
from diablo_export.adapter import Adapter
from diablo_export.converters.merge import merge
from diablo_export.converters.plan_file import read_plan
from diablo_export.errors import InputError
from diablo_export.manifest import read_manifest
from diablo_export.measure.parity import parity
from tests import tiny
from tests.onnx_runs import feeds
from tests.test_grid_merge import little_text  # noqa: F401 - a fixture for all tests here

Get = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def planned(tiny_model: Get, tiny_adapter: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan made by hand for the tiny Llama: a module of each kind, all others at int4. Do not change it."""
    from diablo_export.converters import grid_methods

    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_LENGTH", 32), ("_JUDGED", 4), ("_MOMENTS", 4), ("_FITTED", 6)):
            patch.setattr(grid_methods, name, value)
        arguments: Any = (tiny_model("llama"), tiny_adapter("llama"))
        merge(*arguments, folder / "first", quantize="int4", plan="auto", method="refit", min_survival=0.5)
        edited(
            folder / "first/plan.toml", folder / "plan.toml", {"0.self_attn.q_proj": "branch", "1.mlp.up_proj": "int8"}
        )
        merge(*arguments, folder / "out", quantize="int4", plan=folder / "plan.toml", min_survival=0.5)
    return folder


def edited(plan: Path, target: Path, choices: dict[str, str]) -> Path:
    """A copy of a plan with other choices."""
    text = plan.read_text()
    for module, choice in choices.items():
        text, count = re.subn(rf'({re.escape(module)}" = {{choice = )"\w+"', rf'\1"{choice}"', text)
        assert count == 1
    target.write_text(text)
    return target


def test_a_plan_that_is_edited_and_done_again(planned: Path) -> None:
    manifest = read_manifest(planned / "out")
    assert manifest["survival"]["plan"]["choices"] == {"int4": 12, "int8": 1, "branch": 1}
    assert manifest["options"]["plan"] == str(planned / "plan.toml")
    assert read_plan(planned / "out/plan.toml") == read_plan(planned / "plan.toml")
    entries = {entry["name"].removeprefix("model.layers."): entry for entry in manifest["modules"]}
    assert (entries["1.mlp.up_proj"]["bits"], entries["1.mlp.up_proj"]["action"]) == (8, "merged")
    assert (entries["0.self_attn.q_proj"]["bits"], entries["0.self_attn.q_proj"]["action"]) == (4, "kept")
    assert entries["0.self_attn.k_proj"]["bits"] == 4 and "plan.toml" in manifest["files"]
    nodes = [node for node in ir.load(planned / "out/model.onnx").graph if node.op_type == "MatMulNBits"]
    assert sorted(node.attributes["bits"].as_int() for node in nodes).count(8) == 1
    # more bytes than with every module merged, and those that the plan says
    size = sum((planned / "out" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    least = manifest["survival"]["plan"]["least_bytes"]
    assert size == manifest["survival"]["plan"]["bytes"] > least
    lines = (planned / "out/plan.toml").read_text()
    assert re.search(r'q_proj" = \{choice = "branch", bytes = 6656, gain = 1.0, cosine = 1.0, nats', lines)
    assert read_plan(planned / "first/plan.toml").method == "refit"


def test_a_stock_runtime_runs_it(planned: Path) -> None:
    out, stock = planned / "out", onnxruntime.InferenceSession(str(planned / "out/model.onnx"))
    assert not [given for given in stock.get_inputs() if "diablo" in given.name]  # nobody feeds the branch
    ids = np.array([[5, 6, 7, 8, 9]], np.int64)
    found = stock.run(["logits"], feeds(stock, ids))[0]
    kernels = runtime.session(out / "model.onnx")
    np.testing.assert_allclose(kernels.run(["logits"], feeds(kernels, ids))[0], found, rtol=0, atol=1e-4)
    # the branch is what is said: without its blocks the logits are others
    blocks = next(entry["blocks"] for entry in read_manifest(out)["modules"] if entry["action"] == "kept")
    held = next(v for v in ir.load(out / "model.onnx").graph.initializers.values() if v.name == blocks)
    assert held.const_value is not None
    zeros = {blocks: np.zeros_like(held.const_value.numpy())}
    without = runtime.session(out / "model.onnx", initializers=zeros)
    assert np.abs(without.run(["logits"], feeds(without, ids))[0] - found).max() > 1e-2


@pytest.mark.slow
def test_parity_knows_what_is_where(planned: Path, tiny_adapter: Get) -> None:
    # random weights answer with noise, of which int4 loses more than of a trained model: the gain is not looked at
    report = parity(planned / "out", limit={"adapter.survival_gain": 0.5})
    failed = [check for check in report["checks"] if not check["pass"]]
    assert not failed and report["verdict"] == "pass"
    rows = {row["name"].removeprefix("model.layers."): row for row in report["modules"]}
    # 8 bits are 24 dB more than 4: each bit is worth six
    assert rows["1.mlp.up_proj"]["local_sqnr_db"] > rows["1.mlp.gate_proj"]["local_sqnr_db"] + 18
    merged = parity(planned / "first", limit={"adapter.survival_gain": 0.5})
    assert report["adapter"]["survival_cosine"] > merged["adapter"]["survival_cosine"]


def test_auto_takes_what_is_needed(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "--quantize", "int4")
    result = run(*arguments, "--method", "refit", "--plan", "auto", "--min-survival", 0.99, "-o", out)
    assert result.exit_code == 0, result.output
    survival = read_manifest(out)["survival"]
    (alone,) = survival["tried"]
    plan = survival["plan"]
    assert survival["passed"] and not alone["holds"]
    assert plan["cosine"] >= 0.99 > alone["cosine"] and abs(plan["gain"] - 1) <= 0.01 and plan["kl"] < alone["kl"]
    assert plan["choices"]["int4"] > 0 and plan["choices"]["int8"] > 0
    assert "with all modules merged alike:\n→ refit" in result.stdout
    assert re.search(r"with plan.toml: \d+ modules int4, \d+ modules int8\n  gain", result.stdout)
    more = plan["bytes"] - plan["least_bytes"]
    assert f"{plan['bytes']:,} bytes, {more:,} ({more / plan['least_bytes']:.1%}) more than all merged" in result.stdout
    # done again it is the same to the byte
    again = run(*arguments, "--plan", out / "plan.toml", "--min-survival", 0.99, "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for name in ("model.onnx", "model.onnx.data", "plan.toml"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    # half of those bytes are too few
    least, most = plan["least_bytes"], (plan["least_bytes"] + plan["bytes"]) // 2 + 40_000
    short = ("--method", "refit", "--plan", "auto", "--min-survival", 0.999, "--max-bytes", f"{most / 1000:.3f}kB")
    small = run(*arguments, *short, "-o", tmp_path / "small")
    assert small.exit_code == 1
    assert "with the plan that comes nearest, plan.toml. A plan that keeps it takes up to" in small.stderr
    nearest = read_manifest(tmp_path / "small")["survival"]
    assert not nearest["passed"] and least < nearest["plan"]["bytes"] <= most < nearest["plan"]["needs_bytes"]
    assert nearest["plan"]["cosine"] > alone["cosine"]


def test_an_int4_onnx_model_keeps_branches(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    given = genai_graph("llama", "int4").parent
    arguments: Any = (given, tiny_adapter("llama"))
    manifest = merge(*arguments, tmp_path / "out", plan="auto", method="refit", min_survival=0.98)
    plan = manifest["survival"]["plan"]
    assert manifest["survival"]["passed"] and set(plan["choices"]) == {"int4", "branch"}
    assert not any(node.attributes["bits"].as_int() == 8 for node in _quantized(tmp_path / "out"))
    report = parity(tmp_path / "out", limit={"adapter.survival_gain": 0.5})  # as above
    assert report["verdict"] == "pass", [check for check in report["checks"] if not check["pass"]]
    wide = edited(tmp_path / "out/plan.toml", tmp_path / "plan.toml", {"1.mlp.up_proj": "int8"})
    with pytest.raises(InputError, match=r"1.mlp.up_proj: choice is 'int8'; it can be int4, branch"):
        merge(*arguments, tmp_path / "wide", plan=wide)
    assert not (tmp_path / "wide").exists()


@pytest.mark.slow
def test_a_classifier(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    manifest = merge(
        tiny_model("bert"), tiny_adapter("bert"), tmp_path / "out", quantize="int4", plan="auto", method="refit",
        min_survival=0.995,
    )  # fmt: skip
    assert manifest["survival"]["passed"] and len(manifest["survival"]["plan"]["choices"]) > 1
    assert parity(tmp_path / "out", limit={"adapter.survival_gain": 0.5})["verdict"] == "pass"


def test_plans_that_do_not_fit(planned: Path, run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    plan, out = planned / "plan.toml", tmp_path / "out"
    arguments = ("merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "-o", out, "--quantize", "int4")
    other = tiny.make_adapter(tiny_model("llama"), tmp_path / "other", seed=3)
    another = tiny.make_model("llama", tmp_path / "model", seed=1)
    of_another = tiny.make_adapter(another, tmp_path / "adapter")
    unknown = tmp_path / "unknown.toml"
    unknown.write_text(plan.read_text().replace("1.mlp.up_proj", "9.mlp.up_proj"))
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*arguments[:4], other, *arguments[5:], "--plan", plan), "it was made for another adapter"),
        (
            ("merge", "-m", another, "-a", of_another, *arguments[5:], "--plan", plan),
            "it was made for another base",
        ),
        (
            (*arguments, "--group-size", 16, "--plan", plan),
            "weights that are int4 in groups of 32, symmetric, and here",
        ),
        ((*arguments, "--plan", unknown), "layers.9.mlp.up_proj: the adapter has no such module"),
        ((*arguments, "--plan", tmp_path / "none.toml"), "cannot be read"),
        ((*arguments, "--plan", "auto", "--max-bytes", "100kB"), "max_bytes is 100,000, but the model takes"),
        ((*arguments, "--plan", "auto", "--max-bytes", "lots"), "'lots' is no size"),
        ((*arguments, "--max-bytes", "1GB"), "--max-bytes is for --plan auto"),
        ((*arguments, "--plan", plan, "--method", "rtn"), "--method is in the plan; leave it out"),
        ((*arguments, "--method", "rtn", "--picture", tmp_path / "a.png"), "--method rtn does not measure that here"),
        ((*arguments, "--picture", tmp_path / "a.jpg"), "a picture ends in .png or .svg"),
        ((*arguments[:-2], "--plan", "auto"), "--plan is for quantized weights, and --quantize none rounds nothing"),
    ]
    for given, message in cases:
        result = run(*given)
        assert (result.exit_code, "Traceback" in result.output) == (2, False), result.output
        assert message in " ".join(result.stderr.split()), result.stderr
        assert not out.exists()


def test_data_of_any_name_counts(genai_graph: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    folder = genai_graph("llama", "int4").parent
    shutil.copytree(folder, tmp_path / "model")
    ir.save(ir.load(folder / "model.onnx"), tmp_path / "model/model.onnx", external_data="weights.bin")
    (tmp_path / "model/model.onnx.data").unlink()
    size = sum((tmp_path / "model" / name).stat().st_size for name in ("model.onnx", "weights.bin"))
    with pytest.raises(InputError, match=f"max_bytes is 100,000, but the model takes {size:,} with every module"):
        merge(tmp_path / "model", tiny_adapter("llama"), tmp_path / "out", plan="auto", max_bytes=100_000)


def test_a_tokenizer_with_several_templates(planned: Path, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """They are a folder in the model's: what 8 bits are built anew in takes it away and has it again."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    arguments: Any = (tmp_path / "model", tiny_adapter("llama"), tmp_path / "out")
    manifest = merge(*arguments, quantize="int4", plan=planned / "plan.toml", min_survival=0.5)
    assert manifest["survival"]["plan"]["choices"]["int8"] == 1
    assert "additional_chat_templates/tool_use.jinja" in manifest["files"]


def test_json_has_the_plan(planned: Path) -> None:
    survival = json.loads((planned / "out/diablo_export.json").read_text())["survival"]
    assert survival["plan"].keys() >= {"file", "choices", "gain", "cosine", "kl", "bytes", "max_bytes"}
    modules = survival["tried"][0]["modules"]
    assert modules.keys() == Adapter.load(Path(read_manifest(planned / "out")["adapters"][0]["path"])).modules.keys()
    assert all(one.keys() == {"gain", "cosine", "codes_changed"} for one in modules.values())
    assert survival["plan"]["modules"].keys() == modules.keys()


def _quantized(folder: Path) -> list[ir.Node]:
    return [node for node in ir.load(folder / "model.onnx").graph if node.op_type == "MatMulNBits"]
