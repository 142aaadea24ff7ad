from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import pytest

from diablo_export import runtime
from diablo_export.blockdiag import Array
from diablo_export.errors import InputError

WEIGHT = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(2, 40)).astype(np.float32)
CLOSE = 1e-5  # float32 sums over 40 products of order 1

# W lies (out, in) behind a Transpose, which onnxruntime folds away before it looks at the session's initializers
TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
graph (float[n, 40] X) => (float[n, 6] Y) {
    Wt = Transpose <perm = [1, 0]> (W)
    XW = MatMul (X, Wt)
    Y = Add (XW, B)
}
"""


def save(text: str, path: Path, external: bool, **values: Array) -> Path:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in values.items())
    onnx.save(model, path, save_as_external_data=external, location=path.name + ".data", size_threshold=256)
    return path


@pytest.mark.parametrize("external", [True, False])
def test_an_override_holds_also_where_the_optimizer_folds_it(tmp_path: Path, external: bool) -> None:
    """SessionOptions.add_initializer leaves the old weight here, without a word."""
    path = save(TEXT, tmp_path / "m.onnx", external, W=WEIGHT, B=np.zeros(6, np.float32))
    new = {
        "W": WEIGHT + 1,
        "B": np.ones(6, np.float32),
    }  # W external, B too small for that: both ways at once
    before = path.read_bytes()
    (y,) = runtime.session(path, initializers=new).run(None, {"X": X})
    np.testing.assert_allclose(y, X @ new["W"].T + 1, atol=CLOSE)
    (old,) = runtime.session(path).run(None, {"X": X})
    np.testing.assert_allclose(old, X @ WEIGHT.T, atol=CLOSE)
    assert path.read_bytes() == before


def test_an_override_survives_its_caller_s_arrays(tmp_path: Path) -> None:
    path = save(TEXT, tmp_path / "m.onnx", True, W=WEIGHT, B=np.zeros(6, np.float32))
    session = runtime.session(path, initializers={"W": WEIGHT * 2})  # nobody else holds the array
    clutter = [np.full_like(WEIGHT, 9) for _ in range(50)]
    np.testing.assert_allclose(session.run(None, {"X": X})[0], X @ WEIGHT.T * 2, atol=CLOSE)
    assert len(clutter) == 50


def test_overrides_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    path = save(TEXT, tmp_path / "m.onnx", True, W=WEIGHT, B=np.zeros(6, np.float32))
    wrong: dict[str, Array] = {"W": WEIGHT.T, "B": np.zeros(6, np.float64), "V": WEIGHT}
    with pytest.raises(InputError, match=r"(?s)W: given float32 \(40, 6\).*\(6, 40\).*B: given float64.*V: the model"):
        runtime.session(path, initializers=wrong)


def test_no_file_no_model_no_provider(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.onnx: no such model file"):
        runtime.session(tmp_path / "gone.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(InputError, match=r"bad\.onnx: onnxruntime .* cannot load it"):
        runtime.session(tmp_path / "bad.onnx")
    path = save(TEXT, tmp_path / "m.onnx", False, W=WEIGHT, B=np.zeros(6, np.float32))
    with pytest.raises(InputError, match=r"NoSuchProvider is not in this onnxruntime, which has .*CPU"):
        runtime.session(path, providers=["NoSuchProvider"])


def test_threads_are_set(tmp_path: Path) -> None:
    session = runtime.session(save(TEXT, tmp_path / "m.onnx", False, W=WEIGHT, B=np.zeros(6, np.float32)), threads=1)
    assert session.get_session_options().intra_op_num_threads == 1


def test_library_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, str(library))
    with pytest.raises(InputError, match=r"kernels\.so: no such file"):
        runtime.find_library()
    library.touch()
    assert runtime.find_library() == library


class Options:
    """The two calls that a registration makes; onnxruntime fails on a second registration of a domain."""

    def __init__(self) -> None:
        self.libraries: list[str] = []
        self.entries: dict[str, str] = {}

    def register_custom_ops_library(self, path: str) -> None:
        assert path not in self.libraries, "Domain already set in registry"
        self.libraries.append(path)

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def get_session_config_entry(self, key: str) -> str:
        return self.entries[key]


def test_a_library_is_registered_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.touch()
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, str(library))
    options = Options()
    assert runtime.register(options) == library
    assert runtime.register(options) == library
    assert options.libraries == [str(library)]
    assert not runtime._is_registered(ort.SessionOptions())


def test_no_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runtime.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(runtime, "_LIBRARY_NAMES", dict.fromkeys(["win32", "darwin", "linux"], "absent"))
    assert runtime.find_library() is None
    assert runtime.register(ort.SessionOptions()) is None
