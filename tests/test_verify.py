"""Certificates: made by parity, checked on a device that has numpy and onnxruntime alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result

from diablo_export import runtime
from diablo_export.errors import InputError
from diablo_export.measure import certificate, golden
from diablo_export.measure.certificate import CERTIFICATE, GOLDEN, read
from diablo_export.measure.metrics import kl
from diablo_export.measure.parity import parity
from diablo_export.measure.verify import verify
from tests import exports

Get = Callable[[str], Path]
Run = Callable[..., Result]


# int4 of random weights answers random text as it likes: how well is not what is tested here
LOOSE = {"adapter.survival_gain.error": 9.0, "kl.ratio": 9.0, "top1_agreement.drop": 1.0, "decode.cache": 9.0}


def certified(out: Path, **limit: float) -> Path:
    report = parity(out, limit=limit, certificate=True, **exports.SMALL)
    assert report["verdict"] == "pass", exports.failed(report)
    return out


@pytest.fixture(scope="module")
def branch(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters beside an int4 base."""
    return certified(exports.copy(exported("llama", "int4"), tmp_path_factory.mktemp("verify") / "branch"), **LOOSE)


@pytest.fixture(scope="module")
def merge(tiny_model: Get, tiny_adapter: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "merge"
    return certified(exports.merged(tiny_model("llama"), tiny_adapter("llama"), folder))


def test_a_branch_is_verified_with_each_adapter_and_without(branch: Path) -> None:
    report = verify(branch, threads=1)
    assert report["verdict"] == "pass"
    names = [check["name"] for check in report["checks"]]
    states = [f"{figure}@{name}" for name in ("a", "base", "b") for figure in ("drift", "distance")]
    assert names == ["files", "runs", *states, "alive@a", "alive@b"]
    assert {c["name"]: (c["value"], c["limit"]) for c in report["checks"] if c["limit"] == 1} == {
        "runs": (1, 1), "alive@a": (1, 1), "alive@b": (1, 1),
    }  # fmt: skip
    # the same file on the same machine, with as many threads: nothing to round anew
    assert all(check["value"] == 0 for check in report["checks"] if check["name"].startswith("drift"))
    assert report["environment"]["provider"] == "CPUExecutionProvider"


def test_a_merge_and_a_classifier(merge: Path, tiny_model: Get, tiny_adapter: Get, tmp_path: Path) -> None:
    assert [c["name"] for c in verify(merge)["checks"]] == ["files", "runs", "drift@adapter", "distance@adapter"]
    bert = exports.branched(tiny_model("bert"), {"mood": tiny_adapter("bert")}, tmp_path / "bert")
    report = verify(certified(bert))
    assert report["verdict"] == "pass" and "alive@mood" in [check["name"] for check in report["checks"]]


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "adapters/b.onnx_adapter", "tokenizer.json", "parity.json", GOLDEN,
             "diablo_export.json", CERTIFICATE],
)  # fmt: skip
def test_a_changed_byte_anywhere_fails(branch: Path, run: Run, tmp_path: Path, name: str) -> None:
    out = exports.copy(branch, tmp_path / "out")
    text = (out / name).read_bytes()
    at = text.rindex(b"0") if name == CERTIFICATE else len(text) // 2  # a digit of a hash: still JSON
    (out / name).write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
    result = run("verify", out)
    assert result.exit_code == 1
    assert f"changed since it was certified: {name}" in result.stderr
    assert "drift" not in result.stdout  # what was tampered with is not run


def test_a_missing_file_fails(branch: Path, run: Run, tmp_path: Path) -> None:
    out = exports.copy(branch, tmp_path / "out")
    (out / "adapters" / "b.onnx_adapter").unlink()
    result = run("verify", out)
    assert (result.exit_code, "certified: adapters/b.onnx_adapter" in result.stderr) == (1, True)


def test_a_device_that_computes_something_else_fails(merge: Path, tmp_path: Path) -> None:
    """Hashes right, numbers wrong: the golden rows are those of the model before its final norm was changed."""
    out = exports.copy(merge, tmp_path / "out")
    model = onnx.load(out / "model.onnx")
    norm = next(t for t in model.graph.initializer if "final_norm" in t.name or "norm.weight" in t.name)
    norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm) * np.float32(1.5), norm.name))
    onnx.save(model, out / "model.onnx")
    body, cases, _ = read(merge)
    certificate.write(out, cases or read(merge)[1], body["precision"], body["environment"])
    report = verify(out)
    assert report["verdict"] == "fail"
    assert exports.failed(report) == {"drift@adapter", "distance@adapter"}


@pytest.mark.parametrize("at", [0, -1])
def test_of_several_texts_the_worst_counts(merge: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cases, _ = read(merge)
    assert len(cases) > 1
    drifts = [0.0] * len(cases)
    drifts[at] = 1e9
    figures = iter([figure for drift in drifts for figure in (drift, 0.0)])  # of each text: drift, then distance
    monkeypatch.setattr(golden, "divergence", lambda reference, found: next(figures))
    assert exports.failed(verify(merge)) == {"drift@adapter"}


def test_a_device_that_refuses_the_model_or_leaves_the_adapter_out_fails(
    branch: Path, merge: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here 1 is good, as in parity.json."""
    out = exports.copy(merge, tmp_path / "out")
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes()[:1000])
    body, cases, _ = read(merge)
    certificate.write(out, cases, body["precision"], body["environment"])
    result = run("verify", out)
    assert result.exit_code == 1 and "runs 0 (limit ≥ 1)" in result.stderr
    monkeypatch.setattr(
        runtime, "run", lambda session, feeds, _adapter, names=None, run=runtime.run: run(session, feeds, None, names)
    )
    held = exports.checks(verify(branch))
    assert not held["alive@a"] and not held["alive@b"] and not held["drift@a"] and held["drift@base"]


def test_a_failed_check_gives_no_certificate(merge: Path, tmp_path: Path) -> None:
    out = exports.copy(merge, tmp_path / "out")
    report = parity(out, limit={"logits.max_abs": 0.0}, certificate=True, **exports.SMALL)
    assert report["verdict"] == "fail"
    assert not (out / CERTIFICATE).exists() and not (out / GOLDEN).exists()
    with pytest.raises(InputError, match="absent: no such folder; give the folder that was certified"):
        verify(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no certificate.json; make one with: diablo-export parity .* --cert"):
        verify(out)
    with pytest.raises(InputError, match=r"model.onnx: is a file; give the folder that was certified"):
        verify(out / "model.onnx")


def test_parity_of_a_certified_folder_still_passes(merge: Path, tmp_path: Path) -> None:
    report = parity(exports.copy(merge, tmp_path / "out"), **exports.SMALL)
    assert report["verdict"] == "pass" and report["hashes"]["changed"] == []


def test_what_cannot_be_certified_or_read(
    merge: Path, tiny_model: Get, tiny_adapter: Get, tmp_path: Path, run: Run
) -> None:
    folder = exports.merged(tiny_model("llama"), tiny_adapter("llama"), tmp_path / "hf", format="hf")
    result = run("parity", folder, "--certificate")
    assert result.exit_code == 2 and "--certificate is for what onnxruntime runs from Python" in result.stderr
    out = exports.copy(merge, tmp_path / "out")
    (out / CERTIFICATE).write_text("{")
    assert run("verify", out).exit_code == 2
    result = run("verify", merge, "--provider", "CUDA")
    assert result.exit_code == 2 and "CUDAExecutionProvider is not in this onnxruntime" in result.stderr
    result = run("verify", merge, "--provider", "cpu", "--json")
    assert json.loads(result.stdout)["verdict"] == "pass"


def test_buckets_lose_little() -> None:
    random = np.random.default_rng(0)
    a, b = (random.normal(0, 3, (4, 2000)).astype(np.float32) for _ in range(2))
    case = golden.record(None, np.arange(3), np.arange(4), a, b)
    # data processing: what is not told apart cannot diverge
    assert 0 < case.distance < kl(a, b).mean()
    small = golden.record(None, np.arange(3), np.arange(4), a[:, :200], b[:, :200])
    # every token kept: the same number, to the rounding of float64 sums
    assert small.distance == pytest.approx(kl(a[:, :200], b[:, :200]).mean(), rel=1e-9)
    with pytest.raises(InputError, match=r"logits of shape \(3, 2000\) where 4 rows were certified"):
        case.rows(a[:3])


def test_numpy_and_onnxruntime_are_enough(branch: Path, tmp_path: Path) -> None:
    """In an environment that holds nothing else: a folder of links to these packages and what they need themselves."""
    packages = Path(sysconfig.get_path("purelib"))
    bare = tmp_path / "bare"
    bare.mkdir()
    needed = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging", "sympy", "mpmath")
    for name in (name for name in needed if (packages / name).exists()):
        (bare / name).symlink_to(packages / name)
    shutil.copytree(
        Path(golden.__file__).parents[1], bare / "diablo_export", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = (
        f"import sys, time; sys.path[:0] = [{str(bare)!r}]\n"
        "from diablo_export import runtime\n"
        "from diablo_export.measure import verify\n"
        "spent = [0.0]\n"
        "def timed(function):\n"
        "    def call(*arguments, **named):\n"
        "        start = time.process_time()\n"
        "        try: return function(*arguments, **named)\n"
        "        finally: spent[0] += time.process_time() - start\n"
        "    return call\n"
        "runtime.session, verify._compare = timed(runtime.session), timed(verify._compare)\n"
        f"code = verify.main([{str(branch)!r}])\n"
        "print('start', time.process_time() - spent[0], file=sys.stderr)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'click', 'rich', 'safetensors', 'xxhash', 'ml_dtypes'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "raise SystemExit(code)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("on CPUExecutionProvider, onnxruntime") and done.stdout.endswith("PASS\n")
    # all but loading and running the model, in processor time, which other programs do not lengthen
    assert float(done.stderr.split("start ")[1].split()[0]) < 1
