"""`diablo-export patch`, and the same where numpy is all that there is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from diablo_export import difference

Run = Callable[..., Result]
DATA = "model.onnx.data"


def test_the_commands(patched: Path, tmp_path: Path, run: Run) -> None:
    base, update = Path(shutil.copytree(patched / "base", tmp_path / "base")), tmp_path / "update.patch"
    result = run("patch", "create", patched / "base", patched / "merged", "-o", update)
    assert result.exit_code == 0 and "% of the model's" in result.stdout and "touched groups" in result.stdout
    assert json.loads(run("patch", "info", update, "--json").stdout)["adapters"] == ["adapter"]
    result = run("patch", "apply", base, update)
    assert result.exit_code == 0 and f"in {base}" in result.stdout
    result = run("patch", "revert", base, update, "--json")
    assert DATA in json.loads(result.stdout)["written"]
    (base / DATA).write_bytes(b"")
    result = run("patch", "apply", base, update)
    assert result.exit_code == 2 and f"{DATA}: 0 bytes, " in result.stderr
    result = run("patch", "apply", update, base)
    assert result.exit_code == 2 and "is a patch; the model comes first, then the patch" in result.stderr


def test_numpy_is_enough(patched: Path, tmp_path: Path) -> None:
    """In an environment that holds nothing else: a folder of links to numpy and this package."""
    base, update = Path(shutil.copytree(patched / "base", tmp_path / "base")), patched / "update.patch"
    packages = Path(sysconfig.get_path("purelib"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (name for name in ("numpy", "numpy.libs") if (packages / name).exists()):
        (bare / name).symlink_to(packages / name)
    shutil.copytree(
        Path(difference.__file__).parent, bare / "diablo_export", ignore=shutil.ignore_patterns("__pycache__")
    )

    def device(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = (
            f"import sys; sys.path[:0] = [{str(bare)!r}]\n"
            "from diablo_export.patch import main\n"
            f"code = main({[str(each) for each in arguments]!r})\n"
            "print(*sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))\n"
            "raise SystemExit(code)\n"
        )
        return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)

    done = device("apply", base, update)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) <= {"__main__", "diablo_export", "numpy"}
    assert (base / DATA).read_bytes() == (patched / "merged" / DATA).read_bytes()
    assert device("revert", base, update).returncode == 0
    assert (base / DATA).read_bytes() == (patched / "base" / DATA).read_bytes()
    assert "touched groups" in device("info", update).stdout
    (base / DATA).unlink()
    refused = device("apply", base, update)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "no file, " in refused.stderr
