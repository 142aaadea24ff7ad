"""Faults planted in exports of a real model: each is caught by the numbers alone, and named at the right module.

The table of docs/benchmarks.md, "Planted faults", is this file's; `python -m tests.test_faults` prints it. The hashes
are announced anew after each fault, so that nothing but the comparison can find it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diablo_export.adapter import Adapter
from diablo_export.measure.parity import parity
from tests import exports, tiny

Get = Callable[[str], Path]
Plant = Callable[["Folder"], None]

# one layer's worth of text is enough: a fault is there at every token, the cache's at the last four of a sequence
BOUNDS: dict[str, Any] = {"max_tokens": 96, "steps": 4, "threads": 1}
Q, K, V, OUT = (f"model.layers.1.self_attn.{kind}_proj" for kind in "qkvo")
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"


class Folder:
    """A copy of an export, to be spoilt."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.model = onnx.load(out / "model.onnx", load_external_data=False)

    def save(self) -> None:
        onnx.save(self.model, self.out / "model.onnx")
        exports.announce(self.out)

    def node(self, module: str, kind: str = "MatMul") -> onnx.NodeProto:
        """The linear node of a module."""
        return next(
            node
            for node in self.model.graph.node
            if node.op_type.startswith(kind) and any(entry.value == module for entry in node.metadata_props)
        )

    def change(self, name: str, how: Callable[[Any], Any]) -> None:
        """Replace an initializer's values, where they lie."""
        tensor = next(t for t in self.model.graph.initializer if t.name == name)
        values = np.array(onnx.numpy_helper.to_array(tensor, str(self.out)))
        changed = np.ascontiguousarray(how(values.copy())).astype(values.dtype)
        assert changed.shape == values.shape and not np.array_equal(changed, values)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
            return
        offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
        with (self.out / "model.onnx.data").open("r+b") as stream:
            stream.seek(offset)
            stream.write(changed.tobytes())


def weight_of(module: str, change: Callable[[Any], Any], operand: int = 1) -> Plant:
    return lambda folder: folder.change(folder.node(module).input[operand], change)


def first_group(values: Any, by: Any) -> Any:
    values[0, 0] = by(values[0, 0])
    return values


def turned(values: Any) -> Any:
    """The first group of 32 codes, each from the other end of the grid."""
    return first_group(values, lambda codes: 255 - codes)


def block(values: Any) -> Any:
    """A block of 16 × 16 weights with its sign turned."""
    values[:16, :16] *= -1
    return values


def swapped(folder: Folder) -> None:
    """As many outputs of q as k has, in the place of k's, and k's in theirs."""
    q, k = (
        next(t for t in folder.model.graph.initializer if t.name == folder.node(module).input[1]) for module in (Q, K)
    )
    q_values, k_values = (np.array(onnx.numpy_helper.to_array(tensor, str(folder.out))) for tensor in (q, k))
    width = k_values.shape[1]
    folder.change(k.name, lambda _: q_values[:, :width])
    folder.change(q.name, lambda values: np.concatenate([k_values, values[:, width:]], axis=1))


def swapped_after(folder: Folder) -> None:
    """Layer 1's attention is given k's heads where it should have v's."""
    (node,) = (n for n in folder.model.graph.node if n.op_type == "GroupQueryAttention" and "layers.1" in n.name)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def lost_bias(folder: Folder) -> None:
    module = folder.node(Q)
    (add,) = (n for n in folder.model.graph.node if n.op_type == "Add" and module.output[0] in n.input)
    folder.change(next(name for name in add.input if name != module.output[0]), np.zeros_like)


def late_positions(folder: Folder) -> None:
    """Every token that comes on a cache is written one place too early: over the last one."""
    attentions = [node for node in folder.model.graph.node if node.op_type == "GroupQueryAttention"]
    source, make = attentions[0].input[5], onnx.helper.make_node  # tokens so far, less one
    for node in attentions:
        node.input[5] = "late"
    size = make("Shape", ["input_ids"], ["late.shape"], start=1, end=2)
    constants = [make("Constant", [], ["late.one"], value_ints=[1])]
    alone = [
        make("Equal", ["late.shape", "late.one"], ["late.alone"]),
        make("Cast", ["late.alone"], ["late.shift"], to=onnx.TensorProto.INT32),
        make("Sub", [source, "late.shift"], ["late"]),
    ]
    nodes = list(folder.model.graph.node)
    at = next(i for i, n in enumerate(nodes) if n.op_type == "GroupQueryAttention")
    del folder.model.graph.node[:]
    folder.model.graph.node.extend([*nodes[:at], size, *constants, *alone, *nodes[at:]])


def wrong_rotary(folder: Folder) -> None:
    """Angles of position p + 1 for sines alone: what mixed-up tables do."""
    name = next(n.input[8] for n in folder.model.graph.node if n.op_type == "GroupQueryAttention")
    folder.change(name, lambda values: np.roll(values, -1, axis=0))


def other_norm(folder: Folder) -> None:
    folder.change("model.layers.1.input_layernorm.weight", lambda values: values * np.linspace(0.9, 1.1, values.size))


# name, export (base, how), what is done, and where the report must say that it is
FAULTS: list[tuple[str, str, Plant, str, str]] = [
    ("a corrupted block of a float weight", "merge", weight_of(DOWN, block), DOWN, "output"),
    ("corrupted codes of one int4 group", "branch int4", weight_of(V, turned), V, "weights"),
    ("a doubled int4 scale", "merge int4", weight_of(UP, lambda s: first_group(s, lambda v: 2 * v), 2), UP, "weights"),
    ("an int4 zero point off by one", "merge int4 asymmetric",
     weight_of(OUT, lambda z: first_group(z, lambda v: v ^ 1), 3), OUT, "weights"),
    ("a transposed weight", "merge", weight_of(OUT, lambda w: w.T), OUT, "output"),
    ("a transposed int4 weight", "branch int4", weight_of(OUT, lambda c: np.roll(c, 1, axis=0)), OUT, "weights"),
    ("q and k swapped", "merge", swapped, Q, "output"),
    ("k and v swapped inside attention", "branch int4", swapped_after, OUT, "input"),
    ("a lost bias", "qwen2 merge", lost_bias, Q, "output"),
    ("a lost bias in int4", "qwen2 branch int4", lost_bias, Q, "output"),
    ("KV positions off by one", "merge", late_positions, "model.layers.0.self_attn.o_proj", "input"),
    ("KV positions off by one in int4", "branch int4", late_positions, "model.layers.0.self_attn.o_proj", "input"),
    ("wrong rotary angles", "merge int4", wrong_rotary, "model.layers.0.self_attn.o_proj", "input"),
    ("another norm", "branch int4", other_norm, Q, "input"),
]  # fmt: skip
# adapters that did not arrive as trained: the scale that did, and where the first module says so
SCALES = [("a dropped adapter", 0.0), ("a doubled adapter", 2.0)]
EVERYWHERE = ["merge", "merge int4", "branch"]
KINDS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "merge": (exports.merged, {}),
    "merge int4": (exports.merged, {"quantize": "int4", "method": "rtn"}),
    "merge int4 asymmetric": (exports.merged, {"quantize": "int4", "method": "rtn", "asymmetric": True}),
    "branch int4": (exports.branched, {"quantize": "int4"}),
    "branch": (exports.branched, {}),
}


def table() -> str:
    """The rows of docs/benchmarks.md."""
    cases = [(name, kind, f"{_short(module)}, {fault}") for name, kind, _, module, fault in FAULTS]
    first = f"{_short('model.layers.0.self_attn.q_proj')}, the first adapted"
    cases += [("a weak adapter that was dropped, all of it below one step", "merge int4", f"{first}, adapter")]
    cases += [(name, ", ".join(EVERYWHERE), first) for name, _ in SCALES]
    # in tests/test_modules.py
    cases += [("one code of a fitted group off by one", "merge int4, calibrated", "the module that holds it, weights")]
    rows = [f"| {name} | {kind} | {named} |" for name, kind, named in cases]
    return "\n".join(["| fault | in | named |", "|---|---|---|", *rows])


def _short(module: str) -> str:
    return f"`{module.rpartition('.')[2]}` of layer {module.split('.')[2]}"


def test_the_table_in_the_docs_is_this_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert table() in page
    assert f"None is reported on {len(CLEAN)} sound exports" in page


@pytest.fixture(scope="module")
def bases(tiny_model: Get, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(base, adapter): a real model where there is one, else a tiny llama; a tiny qwen2, for its biases."""

    @functools.cache
    def get(architecture: str) -> tuple[Path, Path]:
        real = Path(os.environ.get("DIABLO_EXPORT_TEST_DATA", "/nowhere")) / "tinystories656k-hf"
        base = real if architecture == "llama" and real.is_dir() else tiny_model(architecture)
        folder = tmp_path_factory.mktemp("faults") / "adapter"
        return base, tiny.make_adapter(base, folder, scale=0.05)

    return get


@pytest.fixture(scope="module")
def sound(bases: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The export before a fault is planted, by its name in FAULTS."""

    @functools.cache
    def get(kind: str) -> Path:
        architecture, kind_alone = ("qwen2", kind[6:]) if kind.startswith("qwen2 ") else ("llama", kind)
        base, adapter = bases(architecture)
        make, options = KINDS[kind_alone]
        given: Any = adapter if make is exports.merged else {"a": adapter}
        return make(base, given, tmp_path_factory.mktemp("sound") / "out", **options)

    return get


@pytest.mark.parametrize(("name", "kind", "plant", "module", "fault"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_caught_and_named(
    name: str, kind: str, plant: Plant, module: str, fault: str, sound: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Folder(exports.copy(sound(kind), tmp_path / "out"))
    plant(folder)
    folder.save()
    report = parity(folder.out, **BOUNDS)
    assert "modules.faulty" in exports.failed(report)
    assert not {"files", "sources"} & exports.failed(report)  # found by numbers, not by a hash
    faults = {row["name"]: row["fault"] for row in report["modules"] if row["fault"]}
    assert (report["first_divergent_module"], faults[module]) == (module, fault), faults


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize(("name", "scale"), SCALES, ids=[name for name, _ in SCALES])
def test_an_adapter_that_did_not_arrive_is_named_at_its_first_module(
    name: str, scale: float, kind: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = bases("llama")
    whole = Adapter.load(adapter)
    wrong = exports.scaled(adapter, tmp_path / "wrong", scale)
    make, options = KINDS[kind]
    given: Any = wrong if make is exports.merged else {"a": wrong}
    out = exports.pretend(make(base, given, tmp_path / "out", **options), adapter)
    report = parity(out, **BOUNDS)
    assert "modules.faulty" in exports.failed(report)
    assert report["first_divergent_module"] == "model.layers.0.self_attn.q_proj" in whole.modules
    assert {row["name"] for row in report["modules"] if row["fault"]} >= set(whole.modules) - {"lm_head"}


@pytest.mark.slow  # five exports
@pytest.mark.parametrize("kind", ["branch int8", "branch int4"])
def test_the_gain_of_a_quantized_branch_passes_and_tells_other_strengths(
    kind: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The default limit lets a sound export through, whose base is rounded, and no adapter that is not all there."""
    base, adapter = bases("llama")
    if kind == "branch int4" and base.name != "tinystories656k-hf":
        pytest.skip("random weights are no model that int4 keeps: DIABLO_EXPORT_TEST_DATA has one")
    options = {"max_tokens": 512, "steps": 2, "threads": 1, "modules": False}
    for scale in (1.0, 0.0, 0.5, 1.25, 2.0):
        wrong = exports.scaled(adapter, tmp_path / f"{scale}", scale)
        out = exports.branched(base, {"a": wrong}, tmp_path / f"out-{scale}", **KINDS[kind][1])
        report = parity(exports.pretend(out, adapter), **options)
        assert ("adapter.survival_gain.error" in exports.failed(report)) == (scale != 1), (scale, report["adapter"])


def test_a_weak_adapter_that_was_dropped_is_named(tiny_model: Get, tmp_path: Path) -> None:
    """All of it is below a step of the grid, so no group is further off than rounding: the sum over all tells."""
    base = tiny_model("llama")
    adapter = tiny.make_adapter(base, tmp_path / "adapter", scale=0.015)
    dropped = exports.scaled(adapter, tmp_path / "dropped", 0)
    out = exports.merged(base, dropped, tmp_path / "out", quantize="int4", method="rtn")
    report = parity(exports.pretend(out, adapter), **BOUNDS)
    assert {row["fault"] for row in report["modules"] if "lm_head" not in row["name"]} == {"adapter"}
    assert report["first_divergent_module"] == "model.layers.0.self_attn.q_proj"


CLEAN = [
    ("llama", "merge"), ("llama", "merge int4"), ("llama", "merge int4 asymmetric"), ("llama", "branch int4"),
    ("llama", "branch"), ("qwen2", "merge"), ("qwen2", "merge int4"), ("qwen2", "branch int4"), ("qwen2", "branch"),
    ("qwen2", "merge int8"), ("qwen2", "branch int8"), ("qwen2", "merge fp16"), ("qwen2", "branch fp16"),
    ("phi3", "merge"), ("phi3", "branch int4"), ("gemma3", "merge int4"), ("gemma3", "branch"),
    ("qwen3", "branch int4"), ("mistral", "merge"), ("gpt2", "branch int4"), ("bert", "branch"), ("bert", "merge int4"),
]  # fmt: skip
KINDS |= {
    "merge int8": (exports.merged, {"quantize": "int8"}),
    "branch int8": (exports.branched, {"quantize": "int8"}),
    "merge fp16": (exports.merged, {"precision": "fp16"}),
    "branch fp16": (exports.branched, {"precision": "fp16"}),
}


@pytest.mark.slow  # a dozen exports
def test_no_module_of_a_clean_export_is_named(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path, subtests: Any
) -> None:
    for index, (architecture, kind) in enumerate(CLEAN):
        with subtests.test(architecture=architecture, kind=kind):
            base, adapter = bases(architecture)
            make, options = KINDS[kind]
            given: Any = adapter if make is exports.merged else {"a": adapter}
            report = parity(make(base, given, tmp_path / str(index), **options), **BOUNDS)
            faults = [row for row in report["modules"] if row["fault"]]
            assert len(report["modules"]) >= 9 and not faults, faults
            assert report["first_divergent_module"] is None and exports.checks(report)["modules.faulty"]


def test_two_looks_give_the_same_digits(sound: Callable[[str], Path]) -> None:
    out = sound("branch int4")
    assert parity(out, **BOUNDS)["modules"] == parity(out, **BOUNDS)["modules"]


if __name__ == "__main__":
    print(table())
