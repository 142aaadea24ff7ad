"""Merging into quantized Hugging Face checkpoints, each read again by a reader of its own in tests/packed.py."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

from diablo_export.adapter import AdaptedModule, Adapter
from diablo_export.blockdiag import Array, add_to_weight
from diablo_export.checkpoint import Checkpoint, read_header
from diablo_export.converters.hf_merge import hf_merge
from diablo_export.converters.merge import merge
from diablo_export.errors import AdapterError, CheckpointError, InputError
from diablo_export.fingerprint import fingerprint
from diablo_export.packed import bnb
from diablo_export.packed.modules import all_stored
from tests import packed
from tests.packed import stored

Get = Callable[[str], Path]


def under(module: AdaptedModule) -> Array:
    mask = np.zeros((module.out_features, module.in_features), bool)
    for inputs, outputs in module.shape.slices():
        mask[outputs, inputs] = True
    return mask


def touched(folder: Path, name: str, module: AdaptedModule) -> Array:
    """Which weights lie in a group that meets a block."""
    met = under(module)
    if name.startswith("nf4"):
        return np.repeat(np.any(met.reshape(-1, 64), 1), 64).reshape(met.shape)
    group_of = np.arange(module.in_features) // (packed.FORMATS[name][3] or 1)
    if name == "gptq-act-order":
        group_of = packed.parts(load_file(folder / "model.safetensors"), module.name)["g_idx"]
    found = np.zeros_like(met)
    for group in np.unique(group_of):
        found[:, group_of == group] = np.any(met[:, group_of == group], 1, keepdims=True)
    return found


@pytest.mark.parametrize("method", ["refit", "rtn"])
@pytest.mark.parametrize("name", packed.FORMATS)
def test_blocks_are_in_the_weights_and_nothing_else_changes(
    name: str, method: str, quantized: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    base, adapter, out = quantized(name), Adapter.load(tiny_adapter("llama")), tmp_path / "out"
    out.mkdir()
    result = hf_merge(base, adapter, out, method)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert [(n, v.dtype, v.shape) for n, v in before.items()] == [(n, v.dtype, v.shape) for n, v in after.items()]
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert all(any(key.startswith(module + ".") for module in adapter.modules) for key in changed)
    entries = {entry["name"]: entry for entry in result.modules}
    gains = []
    for module in adapter.modules.values():
        old, new, met = stored(base, name, module.name), stored(out, name, module.name), touched(base, name, module)
        assert np.array_equal(new[~met], old[~met])
        wanted, block = add_to_weight(old, module.blocks), under(module)
        error, entry = np.abs(new - wanted), entries[module.name]
        if method == "rtn":  # scales stay, so what no block meets does as well
            assert np.array_equal(new[~block], old[~block]) and entry["disturbed_weights"] == 0
            assert {key.rpartition(".")[2] for key in changed} <= {"qweight", "weight_packed", "weight"}
        else:  # nf4's widest gap is a seventh of a group's range, an int4 step a fifteenth; the largest may be cut off
            assert error.max() <= 0.35 * np.abs(wanted).max()
        gain = float(((new - old) * (wanted - old)).sum() / ((wanted - old) ** 2).sum())
        assert entry["weight_gain"] == pytest.approx(gain, abs=1e-4)
        assert entry["disturbed_weights"] == int(((new != old) & ~block).sum())
        gains.append(gain)
    # blocks as large as the weights: on fresh scales they are kept, on the old ones the larger sums are cut off
    assert np.mean(gains) == pytest.approx(1, abs=0.05 if method == "refit" else 0.25)
    assert {entry["layout"] for entry in result.modules} == {packed.FORMATS[name][0]["quant_method"]}


@pytest.mark.parametrize("name", ["gptq-asym", "gptq-act-order", "awq", "compressed-tensors", "nf4", "nf4-double"])
def test_a_refit_leaves_less_error_than_the_old_scales(
    name: str, quantized: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    errors = []
    for method in ("refit", "rtn"):
        out = tmp_path / method
        out.mkdir()
        hf_merge(quantized(name), adapter, out, method)
        off = [
            stored(out, name, one.name) - add_to_weight(stored(quantized(name), name, one.name), one.blocks)
            for one in adapter.modules.values()
        ]
        errors.append(sum(float((each**2).sum()) for each in off))
    assert errors[0] < 0.8 * errors[1]  # these blocks are as large as the weights, and leave the old scales' range


@pytest.mark.parametrize("name", packed.FORMATS)
def test_without_blocks_the_file_is_the_same(name: str, quantized: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    nothing = {key: replace(module, blocks=module.blocks * 0) for key, module in adapter.modules.items()}
    hf_merge(quantized(name), replace(adapter, modules=nothing), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (quantized(name) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors-asym", "nf4"])
def test_untouched_groups_are_the_same_bytes(name: str, quantized: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    """One block in the first quarter of inputs and outputs: every byte that it does not meet, counted in the file."""
    whole = Adapter.load(tiny_adapter("llama")).modules["model.layers.0.self_attn.q_proj"]
    one = replace(whole, blocks=np.where(np.arange(4)[:, None, None] == 0, whole.blocks, 0))
    hf_merge(quantized(name), Adapter({one.name: one}), tmp_path)
    old, new = (np.fromfile(folder / "model.safetensors", np.uint8) for folder in (quantized(name), tmp_path))
    places = np.flatnonzero(old != new)
    infos = read_header(quantized(name) / "model.safetensors")[0]
    inside = [info for info in infos.values() if info.name.startswith(one.name + ".")]
    assert len(places) and all(any(info.start <= place < info.stop for info in inside) for place in places)
    # 16 outputs by one group of 32 inputs, or two rows' halves: half of what is stored for 16 of 64 rows at most
    stored = sum(info.nbytes for info in inside)
    assert len(places) <= stored / 4


def test_what_fills_a_short_last_group_is_no_weight() -> None:
    """A block meets all of 6 × 20 weights, in groups of 64: nothing is disturbed, and nothing else fitted to."""
    random = np.random.default_rng(0)
    tensors = packed.bnb(random.normal(size=(2, 64)).astype(np.float32))
    (state,) = (name for name in tensors if "quant_state" in name)
    stored = json.loads(bytes(tensors[state])) | {"shape": [6, 20]}
    tensors |= {state: np.frombuffer(json.dumps(stored).encode(), np.uint8), "weight": tensors["weight"][:60]}
    module = AdaptedModule("m", random.normal(size=(1, 20, 6)).astype(np.float32), 20, 6)
    _, change = bnb.unpacked(tensors, {}).with_blocks(module, "refit")
    assert (change.touched, change.disturbed) == (2, 0) and change.gain == pytest.approx(1, abs=0.1)


def test_small_blocks_that_rounding_takes_away_are_told(
    quantized: Get, tiny_adapter: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    faint = {key: replace(module, blocks=module.blocks * np.float32(0.01)) for key, module in adapter.modules.items()}
    with caplog.at_level("WARNING", "diablo_export"):
        hf_merge(quantized("gptq"), replace(adapter, modules=faint), tmp_path)
    assert "self_attn.k_proj keeps" in caplog.text and "trains the codes" in caplog.text


@pytest.mark.parametrize("name", ["gptq-act-order", "awq", "nf4-double"])
def test_another_base_is_refused_naming_every_module(
    name: str, quantized: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    random = np.random.default_rng(0)
    other = {
        key: replace(m, fingerprint=fingerprint(random.normal(size=(m.out_features, m.in_features)).astype(np.float32)))
        for key, m in adapter.modules.items()
    }
    with pytest.raises(AdapterError, match="14 of 14 modules do not fit") as caught:
        hf_merge(quantized(name), replace(adapter, modules=other), tmp_path)
    assert "layers.1.mlp.down_proj: has other values than the base weight (cosine of 64 samples" in str(caught.value)


def test_other_sizes_are_refused(quantized: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))
    name = "model.layers.0.mlp.up_proj"
    wrong = AdaptedModule(name, np.ones((4, 24, 24), np.float32), 96, 96)
    for kind in ("awq", "nf4", "compressed-tensors", "gptq"):
        with pytest.raises(
            AdapterError, match=r"up_proj: the model's weight is \[96, 64\], the adapter's is \[96, 96\]"
        ):
            hf_merge(quantized(kind), replace(adapter, modules=adapter.modules | {name: wrong}), tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"quant_method": "fp8"}, "quantized with fp8, where gptq, awq, compressed-tensors, bitsandbytes can be"),
        ({"quant_method": "gptq", "bits": 3}, "quantized with GPTQ in 3 bits, where 2, 4 and 8 can"),
        ({"quant_method": "gptq", "bits": "4"}, "quantized with GPTQ in '4' bits, where 2, 4 and 8 can"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "with GPTQ in the checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, 'quantized with AWQ in 4 bits, version "gemv"'),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        (
            {
                "quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 8}}},
            },
            "compressed-tensors in the format float-quantized of 8 bits",
        ),
        (
            {
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 4}}},
                "transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": [
                    {"targets": ["down_proj"], "location": "input"}, {"targets": ["o"], "location": "weight_input"},
                ]}}},
            },
            "compressed-tensors with transforms that are computed at run time (input), which",
        ),
    ],
)  # fmt: skip
def test_other_formats_are_refused_with_the_reason(
    changes: dict[str, Any], why: str, tiny_model: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    config = {"bits": 4, **changes}
    model = packed.make(tiny_model("llama"), tmp_path / "model", config, lambda weight: {"weight": weight})
    with pytest.raises(CheckpointError, match=re.escape(why)):
        hf_merge(model, Adapter.load(tiny_adapter("llama")), tmp_path)


def broken(model: Path, tensor: str, change: Callable[[Array], Array | None], folder: Path) -> Path:
    """A copy of a model of which one tensor of one layer is changed, or gone."""
    shutil.copytree(model, folder)
    tensors, name = load_file(folder / "model.safetensors"), f"model.layers.0.mlp.up_proj.{tensor}"
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = np.ascontiguousarray(changed)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("gptq", "scales", lambda value: value[:-1]),
        ("gptq", "scales", lambda value: None),
        ("gptq", "qzeros", lambda value: value[:, :-1]),
        ("gptq", "g_idx", lambda value: value + 100),
        ("gptq", "g_idx", lambda value: value - 1),  # numpy would take the last group for -1
        ("awq", "scales", lambda value: value[:-1]),
        ("awq", "qzeros", lambda value: None),
        ("compressed-tensors", "weight_packed", lambda value: value[:, :-1]),
        ("compressed-tensors", "weight_scale", lambda value: None),
        ("nf4", "weight.absmax", lambda value: value[:-1]),
    ],
)
def test_tensors_that_do_not_fit_together(
    name: str, tensor: str, change: Callable[[Array], Array | None], quantized: Get, tiny_adapter: Get, tmp_path: Path
) -> None:
    model = broken(quantized(name), tensor, change, tmp_path / "model")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj: (.*do not fit together|inputs of the groups)"):
        merge(model, tiny_adapter("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "tensor", "change", "why"),
    [
        ("gptq", "scales", lambda value: value * np.float16(np.inf), "of its 192 scales, 192 are NaN or infinite"),
        ("nf4", "weight.absmax", lambda value: value * np.nan, "of its 96 scales, 96 are NaN or infinite"),
        ("nf4", "weight.quant_map", lambda value: value[:8], r"quant_map is no table of 16 numbers \(shape \(8,\)\)"),
        ("nf4", "weight.quant_map", lambda value: value * np.nan, "quant_map is no table of 16 numbers"),
        ("awq", "qzeros", lambda value: value.view(np.int16), "qzeros holds integers of int16, where int32 can be"),
        (
            "gptq",
            "qweight",
            lambda value: value[::2].astype(np.int64),
            "qweight holds integers of int64, where int32 can be",
        ),
        ("gptq-act-order", "g_idx", lambda value: None, 'has no g_idx, and the config says "desc_act": true'),
    ],
)
def test_values_that_make_no_weight(
    name: str, tensor: str, change: Callable[[Array], Array | None], why: str, quantized: Get, tiny_adapter: Get,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = broken(quantized(name), tensor, change, tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"layers\.0\.mlp\.up_proj: .*{why}"):
        merge(model, tiny_adapter("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, r"has no quantization_config, and model\.layers\.0\.mlp\.down_proj\.qweight holds codes"),
        ([1], r"quantization_config is \[1\], and must be an object"),
    ],
)
def test_a_config_that_does_not_say_how_weights_are_quantized(
    said: object, why: str, quantized: Get, tiny_adapter: Get, tmp_path: Path, run: Callable[..., Result]
) -> None:
    model = shutil.copytree(quantized("gptq"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(CheckpointError, match=why):
        merge(model, tiny_adapter("llama"), tmp_path / "out")
    looked = json.loads(run("inspect", model, "--adapter", tiny_adapter("llama"), "--json").stdout)
    assert not looked["fits"] and re.search(why, str(looked["faults"]))


def test_an_adapter_of_another_quantization_is_merged_with_a_word(
    quantized: Get, tiny_adapter: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = Adapter.load(tiny_adapter("llama"))  # of the float model
    grids = {one.name: one.unpacked() for one in all_stored(Checkpoint.open(quantized("awq")))}
    beside = {name: replace(m, fingerprint=fingerprint(grids[name].values())) for name, m in adapter.modules.items()}
    for number, (modules, kind, warned) in enumerate([
        (beside, "awq", False),
        (beside, "gptq", True),
        (beside, "nf4", True),
        (adapter.modules, "awq", True),
    ]):
        caplog.clear()
        (tmp_path / str(number)).mkdir()
        with caplog.at_level("WARNING", "diablo_export"):
            hf_merge(quantized(kind), replace(adapter, modules=modules), tmp_path / str(number))
        assert ("14 of 14 adapted weights are not the very ones" in caplog.text) == warned, kind


def test_zero_points_that_programs_read_in_two_ways(tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    def overflown(weight: Array) -> packed.Tensors:
        return packed.gptq(weight) | {"qzeros": np.full((weight.shape[1] // 32, len(weight) // 8), -1, np.int32)}

    model = packed.make(tiny_model("llama"), tmp_path / "model", packed.FORMATS["gptq"][0], overflown)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r'proj: zero points of 0 in the checkpoint_format "gptq"'):
        hf_merge(model, Adapter.load(tiny_adapter("llama")), tmp_path / "out")


def test_the_command(run: Callable[..., Result], quantized: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    arguments = ("merge", "-m", quantized("awq"), "-a", tiny_adapter("llama"), "-o", tmp_path / "out")
    for options in (["--method", "distilled"], ["--calibration", "text.txt"]):
        refused = run(*arguments, *options)
        assert refused.exit_code == 2 and "is merged by --method refit or rtn" in refused.stderr
    refused = run(*arguments, "--quantize", "int4")
    assert refused.exit_code == 2 and "its weights are quantized already (awq)" in refused.stderr
    looked = json.loads(run("inspect", quantized("awq"), "--adapter", tiny_adapter("llama"), "--json").stdout)
    assert (looked["fits"], looked["adapter_modules_found"]) == (True, "14 of 14")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert (manifest["format"], manifest["quantize"], manifest["options"]["method"]) == ("hf", "int4", "refit")
    entry = next(one for one in manifest["modules"] if one["name"] == "model.layers.0.self_attn.q_proj")
    # four blocks of 16 inputs each meet half a group, in 16 rows each
    assert entry["why"] == "64 of 128 groups, all that a block meets" and entry["bits"] == 4
    assert entry["weight_gain"] == pytest.approx(1, abs=0.1) and entry["disturbed_weights"] > 0


def test_rounded_activations_are_said_once(
    run: Callable[..., Result], tiny_model: Get, tiny_adapter: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """W4A8: the weights are read as those of W4A16, and what runs the checkpoint computes with other numbers."""
    config, quantize, *_ = packed.FORMATS["compressed-tensors"]
    group = config["config_groups"]["group_0"] | {"input_activations": {"num_bits": 8, "type": "int"}}
    config = config | {"config_groups": {"group_0": group}, "kv_cache_scheme": {"num_bits": 8}}
    model = packed.make(tiny_model("llama"), tmp_path / "model", config, quantize)
    result = run("merge", "-m", model, "-a", tiny_adapter("llama"), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    said = "its runtime rounds activations too (input_activations of 8 bits, kv_cache_scheme of 8 bits)"
    assert caplog.text.count(said) == 1
