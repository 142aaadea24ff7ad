"""The recipes in examples/recipes start and run, on a tiny model and a slice of made-up data."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diablo_export.adapter import Adapter
from diablo_export.checkpoint import Checkpoint
from diablo_export.errors import DependencyError
from diablo_export.manifest import read_manifest

FOLDER = Path(__file__).parent.parent / "examples" / "recipes"
PAPER = ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
ALL = sorted([*PAPER, "gate_proj", "o_proj"])
ALPACA = {"instruction": "where sat the cat", "input": "", "output": "the cat sat on the mat"}
DATA = {
    "gsm8k": {"question": "the cat sat on", "answer": "the mat\n#### 1"},
    "metamath": {"query": "the cat sat on", "response": "the mat\nThe answer is: 1"},
}
# the largest of the paper's settings are beyond a tiny model
SMALL = {"num_blocks": 4, "max_steps": 2, "batch_size": 2, "max_length": 96, "dtype": "float32"}
Recipe = Callable[..., Path]


@pytest.fixture
def recipe(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """recipe("gsm8k", "--steps", "train") runs it in this process and returns its output folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "recipe", raising=False)

    def run(name: str, *more: object, **settings: Any) -> Path:
        items = [DATA.get(name, ALPACA)] * 6
        data = tmp_path / "data.json"
        as_list = name == "commonsense"  # both forms of file are taken
        data.write_text(json.dumps(items) if as_list else "".join(json.dumps(item) + "\n" for item in items))
        output = tmp_path / "out"
        chosen = [part for key, value in {**SMALL, **settings}.items() for part in ("--set", f"{key}={value}")]
        given = [data, "--output", output, "--model", tiny_model("llama"), "--items", 5, *chosen, *more]
        monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return output

    return run


def test_every_recipe_is_tested() -> None:
    found = {path.stem for path in FOLDER.glob("*.py")} - {"recipe"}
    assert found == {"gsm8k", "metamath", "commonsense", "code_generation", "safety", "math10k"}


@pytest.mark.parametrize(
    ("name", "modules"),
    [("gsm8k", PAPER), ("metamath", PAPER), ("commonsense", PAPER), ("code_generation", ALL), ("safety", ALL)],
)
def test_recipes_train_and_merge(name: str, modules: list[str], recipe: Recipe) -> None:
    output = recipe(name, "--steps", "train,merge")
    adapter = Adapter.load(output / "adapter")
    assert sorted({path.rpartition(".")[2] for path in adapter.modules}) == modules and adapter.num_blocks == 4
    assert all(module.blocks.any() for module in adapter.modules.values())
    lines = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and set(lines[0]) == {"prompt", "completion"}
    assert lines[0]["completion"].strip() == list(DATA.get(name, ALPACA).values())[-1]
    assert Checkpoint.open(output / "merged").tensors
    before = (output / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    recipe(name, "--steps", "train,merge")  # nothing is left to do
    assert (output / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("bits", ["int4", "int2"])
def test_low_bit_recipe_trains_beside_the_weights_that_it_exports(bits: str, recipe: Recipe) -> None:
    output = recipe("math10k", "--steps", "train,export", base_quantize=bits, group_size=32)
    adapter = Adapter.load(output / "adapter")
    assert adapter.base_grid is not None and adapter.base_grid.bits == int(bits[3:])
    manifest = read_manifest(output / "branch")
    assert manifest["options"]["quantize"] == bits and (output / "branch" / "adapters").is_dir()


def test_a_missing_harness_is_said_before_the_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DependencyError, match=r"'lm_eval'.*diablo-export\[eval\]"):
        recipe("gsm8k")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # the harness reads its thousands of task files
def test_evaluation_of_base_tuned_merged_and_exported(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "held.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "the dog sat on the log"}\n')
    (tasks / "sits.yaml").write_text(
        "task: sits\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(tasks / "held.jsonl") + "\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n"
    )
    recipe("gsm8k", "--tasks", "sits", "--include-path", tasks, lr=0.05)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"model"')]
    figures = {line["model"]: line["sits"]["word_perplexity,none"] for line in printed}
    assert list(figures) == ["base", "tuned", "merge", "export"]
    assert figures["merge"] == pytest.approx(figures["tuned"], rel=1e-4)  # the same weights, added up in another order
    assert figures["export"] == pytest.approx(figures["tuned"], rel=1e-4)
    assert abs(figures["base"] / figures["tuned"] - 1) > 0.01
