"""The documentation holds: its commands run, its links and files exist, its command reference is the program's."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from diablo_export.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
Folder = Callable[[str], Path]

# What the README leaves to its defaults, cut down to a tiny model and a few seconds.
SMALLER = {
    "train": ["--max-steps", "20", "--lr", "0.02", "--batch-size", "4", "--max-length", "32"],
    "parity": ["--samples", "4", "--steps", "4"],
}


@pytest.fixture(scope="module")
def workplace(tiny_model: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README takes for granted: model, train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "model").symlink_to(tiny_model("llama"))
    lines = [{"prompt": f"the {animal} sat on ", "completion": "the mat"} for animal in ("cat", "dog", "hen", "cow")]
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines * 4))
    return folder


@pytest.fixture
def beside(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, the working one, with the model and the data."""
    for name in ("model", "train.jsonl"):
        (tmp_path / name).symlink_to(workplace / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks that are marked to be run, in order."""
    pattern = r"<!-- runs -->\n```(\w+)\n(.*?)```"
    yield from re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL)


def run_console(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line.removeprefix("$ "))
        assert line.startswith("$ ") and program == "diablo-export", line
        result = CliRunner().invoke(main, [*arguments, *SMALLER.get(arguments[0], [])])
        assert result.exit_code == 0, f"{line}\n{result.output}"


def run_page(name: str) -> None:
    for language, text in blocks(ROOT / "docs" / name):
        assert language == "console"
        run_console(text)


def test_readme_runs_from_top_to_bottom(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    found = list(blocks(ROOT / "README.md"))
    assert [language for language, _ in found] == ["console", "python", "python"]
    names: dict[str, object] = {}
    for language, text in found:
        if language == "console":
            run_console(text)
        else:
            exec(text, names)
    assert names["base"].shape == names["tuned"].shape  # type: ignore[attr-defined]
    assert (names["base"] != names["tuned"]).any()  # type: ignore[attr-defined]


def test_runtime_page_runs_from_top_to_bottom(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diablo_export import runtime
    from tests.onnx_runs import feeds

    shutil.copytree(exported("llama"), tmp_path / "branch")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"feeds": feeds(runtime.session("branch/model.onnx"))}
    found = list(blocks(ROOT / "docs" / "swapping.md"))
    assert [language for language, _ in found] == ["python"] * 4
    for _, text in found:
        exec(text, names)
    assert (names["bound"] == names["first"]).all()
    outputs = [names[name] for name in ("base", "first", "second", "mixed")]
    assert all((one != other).any() for one, other in itertools.combinations(outputs, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("beside")
def test_low_bit_page_runs_from_top_to_bottom() -> None:
    run_page("low_bit.md")
    survival = json.loads(Path("merged/diablo_export.json").read_text())["survival"]
    assert (survival["method"], survival["passed"]) == ("on_grid", True)
    assert json.loads(Path("moved/adapter_config.json").read_text())["base_quantization"]["on_grid"]


def test_training_page_runs_and_leaves_nothing(beside: Path) -> None:
    run_page("training.md")
    assert sorted(path.name for path in beside.iterdir()) == ["model", "train.jsonl"]


def test_patch_commands_run(
    genai_graph: Callable[..., Path], tiny_adapter: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diablo_export.converters.merge import merge

    monkeypatch.chdir(tmp_path)
    base = genai_graph("llama", "int4").parent
    shutil.copytree(base, "base", ignore=shutil.ignore_patterns("cache"))
    merge("base", tiny_adapter("llama"), "merged", method="rtn")
    ((language, text),) = blocks(ROOT / "docs" / "merging.md")
    assert language == "console" and text.count("diablo-export patch") == 4
    run_console(text)
    data = "model.onnx.data"
    assert (base / data).read_bytes() == Path("base", data).read_bytes() != Path("merged", data).read_bytes()


def test_patch_benchmark_runs(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "examples" / "benchmarks" / "patch_size.py"
    given = ["--model", workplace / "model", "--num-blocks", 4, "--scale", 0.02, "--work", tmp_path / "work"]
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, given)])
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(r"^\| 4 \| 0.02 \| 0\.\d\d MB \| 0\.\d\d MB \| [\d.]+ \|", capsys.readouterr().out, re.MULTILINE)


def test_swap_benchmark_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "examples" / "benchmarks" / "swap_cost.py"
    given = ["--model", workplace / "model", "--num-blocks", 8, 4, "--quantize", "none", "--rounds", 2, "--swaps", 30]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, given)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (run options|I/O binding) \| (base|A|B) \| [\d.]+ \(", printed, re.MULTILINE)
    assert len(rows) == 6 and "14 inputs" in printed
    assert re.search(r"loading A: [\d.]+ ms", printed) and re.search(r"30 swaps: [+-]|cannot be read", printed)


def test_examples_run_in_order(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, train, test = (str(workplace / name) for name in ("model", "train.jsonl", "test.jsonl"))
    given = {"01": [model, train], "02": [model], "03": [model], "04": [test], "05": [model], "06": ["branch"]}
    scripts = sorted((ROOT / "examples").glob("[0-9]*.py"))
    assert [script.name[:2] for script in scripts] == list(given)
    folder = workplace / "examples"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [str(script), *given[script.name[:2]]])
        with contextlib.suppress(SystemExit):  # its argument is tested by the verdict that is printed
            runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr().out
        assert printed.strip() and "FAIL" not in printed, f"{script.name}\n{printed}"


def test_command_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec and spec.loader
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert make_cli.FILE.read_text(encoding="utf-8") == make_cli.render(), "run: python docs/make_cli.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_and_helps_with_an_example(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None and command.help is not None
    assert re.search(rf"Example:\n +diablo-export {name}\b", command.help)
    below = command.commands.values() if isinstance(command, click.Group) else ()
    assert all(one.help and re.search(rf"Example:\n +diablo-export {name} {one.name}\b", one.help) for one in below)
    silent = [
        option.name
        for one in (command, *below)
        for option in one.params
        if isinstance(option, click.Option) and not option.help and option.default is None
    ]
    assert not silent, f"options without help or default: {silent}"
    assert re.search(rf"^\| `{name}` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_file_tree_is_the_repository() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## Layout\n\n```\n(.*?)```", text, re.DOTALL)
    assert tree
    listed, folder = set(), ""
    for line in tree[1].splitlines():
        name = re.sub(r"^[├└]── ", "", line).split()[0]
        folder = folder if line[0] in "├└" else name
        listed.add(folder + name if line[0] in "├└" else name)
    missing = [name for name in listed if not (ROOT / name).exists()]
    assert not missing, f"README lists what is not there: {missing}"
    modules = {f"diablo_export/{path.name}" for path in (ROOT / "diablo_export").glob("*.py")} - {
        "diablo_export/__init__.py"
    }
    assert modules <= listed, f"README does not list {modules - listed}"


def test_numbers_name_the_script_that_makes_them() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    scripts = re.findall(r"examples/benchmarks/\w+\.py", text)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
