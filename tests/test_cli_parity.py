from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests import exports

Get = Callable[[str], Path]
Run = Callable[..., Result]
SMALL = ("--max-tokens", 160, "--steps", 6, "--threads", 1)


@pytest.fixture(scope="module")
def out(tiny_model: Get, tiny_adapter: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path_factory.mktemp("cli") / "out")


def test_a_good_export_exits_0_and_writes_everything(out: Path, run: Run, tmp_path: Path) -> None:
    result = run("parity", out, *SMALL, "--json", tmp_path / "r.json", "--junit", tmp_path / "r.xml")
    assert result.exit_code == 0, result.output
    assert "logits.max_abs" in result.stdout and "PASS: 13 of 13 checks held" in result.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads((out / "parity.json").read_text())
    cases = ElementTree.parse(tmp_path / "r.xml").getroot().iter("testcase")
    assert [case.get("name") for case in cases] == [check["name"] for check in report["checks"]]


def test_quiet_prints_nothing_when_all_is_well(out: Path, run: Run) -> None:
    result = run("parity", out, *SMALL, "-q")
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate"])
def test_a_package_that_is_missing_is_no_failed_check(
    package: str, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run("parity", out, *SMALL)
    assert result.exit_code == 2 and not isinstance(result.exception, ImportError)
    assert f"needs the Python package '{package}'" in result.stderr and 'diablo-export[train]"' in result.stderr


def test_a_dropped_adapter_exits_1_with_the_checks_named(
    tiny_model: Get, tiny_adapter: Get, run: Run, tmp_path: Path
) -> None:
    zero = exports.scaled(tiny_adapter("llama"), tmp_path / "zero", 0)
    out = exports.merged(tiny_model("llama"), zero, tmp_path / "out")
    result = run("parity", exports.pretend(out, tiny_adapter("llama")), *SMALL, "-q")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "adapter.alive 0 (limit ≥ 1)" in line and "logits.max_abs" in line
    assert json.loads((out / "parity.json").read_text())["verdict"] == "fail"


def test_a_changed_byte_exits_1(out: Path, run: Run, tmp_path: Path) -> None:
    changed = exports.copy(out, tmp_path / "out")
    exports.flip_byte(changed / "model.onnx.data", 9)
    result = run("parity", changed, *SMALL, "-q")
    assert result.exit_code == 1
    assert "files 1 (limit ≤ 0)" in result.stderr and "changed since the export: model.onnx.data" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "speed=1"), "--limit speed=1: no such figure"),
        (("--data", "/nowhere/d.jsonl"), "/nowhere/d.jsonl: cannot be read"),
        (("--model", "/nowhere/model"), "/nowhere/model: no such model folder"),
        (("--adapter", "who"), "--adapter who: this folder has the adapters adapter"),
        (("--steps", "0"), "0 is not in the range x>=1"),
    ],
)
def test_bad_input_exits_2_with_one_message(options: tuple[str, ...], message: str, out: Path, run: Run) -> None:
    result = run("parity", out, "-q", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_has_an_example_and_loads_no_torch() -> None:
    code = (
        "import sys; from diablo_export.cli import main\n"
        "try: main(['parity', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "diablo-export parity int4 --data test.jsonl" in done.stdout
