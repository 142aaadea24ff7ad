"""The examples in docs/runtimes.md run, each in its runtime, and give the same tokens."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from diablo_export.cli import main
from tests.runtimes import tools
from tests.runtimes.reference import wanted

pytestmark = pytest.mark.runtimes
Get = Callable[..., Path]
PAGE = (tools.ROOT / "docs/runtimes.md").read_text(encoding="utf-8")
PROMPT, STEPS = [5, 6, 7], 9  # the examples'


def example(heading: str, language: str) -> str:
    """The first block of a language in the section of this heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert block
    return block[1]


@pytest.fixture
def workplace(exported: Get, tiny_model: Get, tiny_adapter: Get, other_adapter: Get, tmp_path: Path) -> Path:
    """A folder with what the page takes for granted."""
    (tmp_path / "branch").symlink_to(exported("llama"))
    for name, made in (("model", tiny_model), ("adapter", tiny_adapter), ("other", other_adapter)):
        (tmp_path / name).symlink_to(made("llama"))
    return tmp_path


def test_genai(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.genai()
    monkeypatch.chdir(workplace)
    names: dict[str, list[int]] = {}
    exec(example("onnxruntime-genai", "python"), names)
    assert list(names["tokens"]) == PROMPT + wanted(workplace / "branch", "a", STEPS, PROMPT).tokens


def test_optimum(workplace: Path) -> None:
    code = example("optimum", "python") + "\nprint(tokens[0].tolist())"
    done = subprocess.run(
        [str(tools.optimum()), "-c", code], cwd=workplace, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == PROMPT + wanted(workplace / "branch", "a", STEPS, PROMPT).tokens


def test_javascript(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tools.npm()
    monkeypatch.chdir(workplace)
    command = example("JavaScript", "console").split()
    assert command[:2] == ["$", "diablo-export"]
    result = CliRunner().invoke(main, command[2:])
    assert result.exit_code == 0, result.output
    code = example("JavaScript", "js").replace("./diablo.js", (tools.ROOT / "examples/web/diablo.js").as_uri())
    code = code.replace("branch-web/", f"{workplace}/branch-web/")
    done = subprocess.run(
        ["node", "--input-type=module"], input=code, cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {name: [int(token) for token in tokens] for name, *tokens in map(str.split, done.stdout.splitlines())}
    assert lines == {name: wanted(workplace / "branch", name, STEPS, PROMPT).tokens for name in ("base", "a", "b")}


def test_the_page_and_the_tests_take_the_same_versions() -> None:
    page, tests = (
        json.loads(file.read_text())["dependencies"]
        for file in (tools.ROOT / "examples/web/package.json", tools.HERE / "package.json")
    )
    assert page.items() <= tests.items()
