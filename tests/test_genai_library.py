"""Libraries that a model folder names: written on request alone, never loaded by our session, loaded by genai."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from diablo_export import runtime
from diablo_export.converters import genai_library
from diablo_export.converters.export import export
from diablo_export.converters.genai_config import CONFIG
from diablo_export.errors import InputError
from tests.onnx_runs import IDS, LOGITS, runner

Get = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that leaves the file TRAP.sprung beside itself when a program loads it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("trap")
    source = folder / "trap.c"
    source.write_text(
        "#include <stdio.h>\n"
        f'__attribute__((constructor)) static void spring(void) {{ fclose(fopen("{folder}/sprung", "w")); }}\n'
        "void* RegisterCustomOps(void* options, void* base) { return 0; }\n"
    )
    made = folder / "trap.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return made


def named(folder: Path) -> Any:
    config = json.loads((folder / CONFIG).read_text())
    return config["model"]["decoder"]["session_options"].get(genai_library.KEY)


def copied(folder: Path, target: Path, library: Path | str) -> Path:
    """The same export with a library named in its genai_config.json and in its manifest."""
    shutil.copytree(folder, target)
    config = json.loads((target / CONFIG).read_text())
    config["model"]["decoder"]["session_options"][genai_library.KEY] = str(library)
    (target / CONFIG).write_text(json.dumps(config))
    manifest = json.loads((target / "diablo_export.json").read_text())
    manifest[genai_library.KEY] = manifest["options"][genai_library.KEY] = str(library)
    (target / "diablo_export.json").write_text(json.dumps(manifest))
    return target


def in_genai(folder: Path, adapter: str | None) -> Any:
    """The logits of the last of IDS."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=IDS.shape[1] + 1, do_sample=False)
    generator, adapters = og.Generator(model, params), og.Adapters(model)
    if adapter is not None:
        adapters.load(str(folder / "adapters" / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(IDS[0].tolist())
    return np.array(generator.get_logits())[0, -1]


def test_no_library_is_named_unless_asked_for(exported: Get) -> None:
    assert named(exported("llama")) is None
    assert json.loads((exported("llama") / "diablo_export.json").read_text())["options"][genai_library.KEY] is None


def test_our_session_loads_no_library_that_a_folder_names(exported: Get, trap: Path, tmp_path: Path) -> None:
    """Named by path and lying in the folder under the names that are looked for elsewhere."""
    folder = copied(exported("llama"), tmp_path / "branch", trap)
    for place in ("", "kernels", "kernels/build"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(trap, folder / place / "libdiablo_kernels_ort.so")
    code = (  # a process of its own, in that folder, as the worst case
        "import sys; from diablo_export import runtime\n"
        "runtime.session('model.onnx'); runtime.session(sys.argv[1] + '/model.onnx')"
    )
    sprung = trap.parent / "sprung"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    assert not sprung.exists()
    subprocess.run(command, check=True, cwd=folder, env={**environment, runtime.LIBRARY_VARIABLE: str(trap)})
    assert sprung.exists()  # the trap works: named by the user, it is loaded


def test_genai_runs_the_named_library(
    tiny_model: Get,
    tiny_adapter: Get,
    library: Path,
    run: Run,
    tmp_path: Path,
    exported: Get,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same numbers with it and without; that it is loaded is seen by what happens when it is none."""
    out = tmp_path / "branch"
    result = run(
        "export", "--model", tiny_model("llama"), "--adapter", f"a={tiny_adapter('llama')}", "--output", out,
        "--custom-ops-library", "auto",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert named(out) == library.name and (out / library.name).read_bytes() == library.read_bytes()
    assert json.loads((out / "diablo_export.json").read_text())["options"][genai_library.KEY] == str(library)
    monkeypatch.chdir(tmp_path)  # genai 0.18 takes libraries from the current folder as well
    alone = runner(out / "model.onnx")
    for adapter in (None, "a"):
        logits = in_genai(out, adapter)
        np.testing.assert_allclose(logits, in_genai(exported("llama"), adapter), rtol=0, atol=LOGITS)
        file = out / f"adapters/{adapter}.onnx_adapter" if adapter else None
        np.testing.assert_allclose(logits, alone(file)[0, -1], rtol=0, atol=LOGITS)
    assert np.abs(in_genai(out, "a") - in_genai(out, None)).max() > 1000 * LOGITS
    (out / library.name).write_bytes(b"no library")
    with pytest.raises(Exception, match=library.name):
        in_genai(out, None)


def test_a_given_model_s_library_is_dropped(
    genai_graph: Get, tiny_adapter: Get, tmp_path: Path, trap: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = tmp_path / "given"
    shutil.copytree(genai_graph("llama", "fp32").parent, given)
    config = json.loads((given / CONFIG).read_text())
    config["model"]["decoder"]["session_options"][genai_library.KEY] = str(trap)
    (given / CONFIG).write_text(json.dumps(config))
    export(given, tiny_adapter("llama"), tmp_path / "out")
    assert named(tmp_path / "out") is None
    assert f"left out custom_ops_library, which named {trap}" in caplog.text


def test_what_cannot_be_named(
    tiny_model: Get, tiny_adapter: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    given: tuple[Any, ...] = (tiny_model("llama"), tiny_adapter("llama"), tmp_path / "out")
    with pytest.raises(
        InputError, match=r"--custom-ops-library \S+gone\.so: no such file; give a library's path, or auto"
    ):
        export(*given, custom_ops_library=tmp_path / "gone.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(InputError, match=r"text\.so: cannot be loaded as a library: file too short"):
        export(*given, custom_ops_library=tmp_path / "text.so")
    with pytest.raises(InputError, match=r"it does not run exports for web: leave it out"):
        export(*given, custom_ops_library=library, for_="web")
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, "off")
    with pytest.raises(InputError, match=r"-library auto: no kernel library found(?s:.*)leave the option out"):
        export(*given, custom_ops_library="auto")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"this export has no genai_config\.json: onnxruntime-genai does not run it"):
        genai_library.write(tmp_path, library)
