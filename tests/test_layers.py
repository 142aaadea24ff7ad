"""Imports go down only, and heavy packages stay where they belong; LAYERS is the map of the package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "diablo_export"

# From the bottom up. A module may import from its own line and from those above it in this list.
LAYERS = [
    ["errors"],
    ["blockdiag"],
    ["checkpoint", "block_storage", "difference"],
    ["fingerprint"],
    ["adapter", "base_grid", "quantization", "requantize", "opschema", "output", "console", "patch_header"],
    ["packed", "algorithms"],
    ["manifest", "patch", "runtime", "swap", "combine", "machine"],
    ["kernel_check"],
    ["diagnosis"],
    ["trainer"],
    ["peft"],
    ["measure"],
    ["timing"],
    ["converters"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# who may import it, anywhere in the file; a trailing dot means the whole subpackage
ALLOWED = {
    "click": ["cli."],
    "torch": ["trainer.", "peft.", "measure.", "converters."],
    "transformers": ["trainer.", "peft.", "measure.", "converters."],
    "onnx": ["opschema", "runtime", "measure.", "timing.", "converters."],
    "onnx_ir": ["measure.", "timing.", "converters."],
    "onnxruntime": ["runtime", "measure.", "timing.", "converters."],
    "onnxruntime_genai": ["measure.", "converters."],
    "matplotlib": ["trainer.", "measure.", "timing."],
}
HEAVY = ["torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "matplotlib", "optimum"]


def sources() -> dict[str, Path]:
    """Every module of the package by its path within it, such as trainer.layer."""
    files = [(file, file.relative_to(ROOT / PACKAGE)) for file in (ROOT / PACKAGE).rglob("*.py")]
    files += [(file, Path("converters") / file.name) for file in (ROOT / "converters").glob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): file for file, path in files}
    return {name: file for name, file in names.items() if name != "__init__"}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What a file imports at run time, anywhere in it, and the line."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        else:
            yield from imports(node)


def test_every_module_is_on_the_map() -> None:
    assert {name.partition(".")[0] for name in sources()} == set(LEVEL)


def test_imports_go_down_only() -> None:
    faults = []
    for name, file in sources().items():
        own = LEVEL[name.partition(".")[0]]
        for imported, line in imports(ast.parse(file.read_text(encoding="utf-8"))):
            package, _, inner = imported.partition(".")
            part = inner.partition(".")[0]
            if package == PACKAGE and part in LEVEL and LEVEL[part] > own:
                faults.append(f"{file.relative_to(ROOT)}:{line} ({name}) must not import {part}")
    assert not faults, "\n".join(faults)


def test_heavy_packages_stay_where_they_belong() -> None:
    faults = []
    for name, file in sources().items():
        for imported, line in imports(ast.parse(file.read_text(encoding="utf-8"))):
            allowed = ALLOWED.get(imported.partition(".")[0])
            if allowed is not None and not any(f"{name}.".startswith(each) or name == each for each in allowed):
                faults.append(f"{file.relative_to(ROOT)}:{line} ({name}) must not import {imported}")
    assert not faults, "\n".join(faults)


def test_the_rule_sees_a_fault() -> None:
    found = dict(imports(ast.parse("def f():\n    from diablo_export.cli import main\n")))
    assert found == {"diablo_export.cli.main": 2}
    assert not list(imports(ast.parse("if TYPE_CHECKING:\n    import torch\n")))


@pytest.mark.parametrize("module", ["diablo_export", "diablo_export.cli", "diablo_export.adapter"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("arguments", [[], ["train"], ["merge"], ["export"], ["parity"], ["patch", "apply"], ["demo"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom diablo_export.cli import main\nmain([*sys.argv[1:], '--help'], standalone_mode=False)\n"
        f"print('heavy:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_help_answers_at_once() -> None:
    """Under 0.3 s of processor time, the best of several runs: other programs share the machine, and its clock."""
    best = 10.0
    for _ in range(5):
        before = os.times()
        code = "from diablo_export.cli import main; main(['--help'])"  # what the console script does
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
    assert best < 0.3
