"""The picture of what merges keep: where modules lie, and that both kinds of file are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from diablo_export.errors import InputError
from diablo_export.measure.survival_picture import check_file, draw, grid, place, places, rows
from tests.test_grid_merge import little_text  # noqa: F401 - a fixture for all tests here

Get = Callable[..., Path]
Run = Callable[..., Result]
MODULES = {
    "model.layers.0.mlp.up_proj": {"gain": 1.0, "cosine": 0.9},
    "model.layers.10.mlp.up_proj": {"gain": 0.4, "cosine": 0.1},
    "model.layers.2.self_attn.q_proj": {"gain": 1.2, "cosine": 1.0},
    "lm_head": {"gain": 1.0, "cosine": float("nan")},
}
ROW = {"method": "rtn", "gain": 0.9, "cosine": 0.8, "kl": 0.1, "modules": MODULES}


def test_modules_have_their_places() -> None:
    assert place("model.layers.3.self_attn.q_proj") == ("self_attn.q_proj", "3")
    assert place("transformer.h.0.attn.c_attn") == ("attn.c_attn", "0") and place("lm_head") == ("lm_head", "")
    leaves, layers = places([ROW, {**ROW, "modules": {"model.layers.1.mlp.down_proj": {}}}])
    assert leaves == ["mlp.up_proj", "self_attn.q_proj", "lm_head", "mlp.down_proj"]
    assert layers == ["0", "1", "2", "10", ""]
    found = grid(MODULES, leaves, layers, "gain")
    assert found[0, 3] == 0.4 and found[1, 2] == 1.2 and found[2, 4] == 1 and np.isnan(found).sum() == 20 - 4


def test_a_plan_is_a_column() -> None:
    plan = {"choices": {"int4": 4}, **ROW}
    assert [row["method"] for row in rows({"tried": [ROW], "plan": plan})] == ["rtn", "rtn"]
    del plan["method"]
    assert [row["method"] for row in rows({"tried": [ROW], "plan": plan})] == ["rtn", "plan"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_drawn(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"picture.{ending}"
    draw([ROW, {**ROW, "method": "hqq"}], file, "an $a_$ adapter")  # no formula
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(content) > 5_000


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a picture ends in .png or .svg"):
        check_file(tmp_path / "a.pdf")
    with pytest.raises(InputError, match="its folder does not exist"):
        check_file(tmp_path / "nowhere/a.png")


def test_merge_draws_and_counts_hits(run: Run, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(["the cat sat on the mat and the dog sat on the log"] * 40))
    picture = tmp_path / "kept.svg"
    result = run(
        "merge", "-m", tiny_model("llama"), "-a", tiny_adapter("llama"), "--quantize", "int4", "--method", "calibrated",
        "--min-survival", 0.5, "--calibration", tmp_path / "text.txt", "--picture", picture, "-o", tmp_path / "out",
        "--json",
    )  # fmt: skip
    assert result.exit_code in (0, 1), result.output
    assert picture.stat().st_size > 5_000
    (row,) = json.loads(result.stdout)["survival"]["tried"]
    # of random weights: about the logarithm of the vocabulary of 320, or more where they are sure of themselves
    assert 5 < row["loss"] < 12 and row["loss"] == pytest.approx(row["branch_loss"], rel=0.2)
    assert row["branch_loss"] != row["base_loss"]
