"""The kernel library in ONNX Runtime: its numbers, that it is what runs, and that the function body agrees with it."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from diablo_export import opschema, runtime
from diablo_export.blockdiag import Array, BlockShape, apply
from diablo_export.errors import InputError

FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
# dtype, and what one rounding to it costs: half a unit of its last bit, twice, as the sum before may differ as well
TYPES: dict[int, tuple[Any, float]] = {
    FLOAT: (np.float32, 2.0**-22),
    HALF: (np.float16, 2.0**-10),
    BRAIN: (ml_dtypes.bfloat16, 2.0**-7),
}
# leading sizes of X, K, N, num_blocks asked for
CASES = [
    ((2, 3), 16, 32, 4),
    ((7,), 896, 896, 64),  # blocks of 14 × 14: no vector fits
    ((1, 1), 896, 128, 128),  # blocks of 7 × 1
    ((40,), 896, 128, 128),
    ((33,), 300, 530, 2),  # several panels in both directions
    ((5,), 9, 10, 4),  # both sides padded
    ((3,), 9, 100, 4),  # outputs that no block covers
    ((2, 3, 2), 65, 64, 64),
    ((130,), 260, 140, 1),
]


pytestmark = pytest.mark.usefixtures("library")


def graph(lead: int, k: int, n: int, element: int = FLOAT) -> onnx.ModelProto:
    """Y = BlockDiagMatMul(X, D, Y1 + 0), D an overridable initializer that is empty by default."""
    value = helper.make_tensor_value_info
    rows = [f"m{i}" for i in range(lead)]
    inputs = [value("X", element, [*rows, k]), value("D", element, ["b", "i", "o"]), value("Y1", element, [*rows, n])]
    zero = helper.make_tensor("zero", element, [1], [0.0])
    nodes = [
        helper.make_node("Add", ["Y1", "zero"], ["Y0"]),
        helper.make_node(opschema.NAME, list(opschema.INPUTS), ["Y"], name="branch", domain=opschema.DOMAIN),
    ]
    if element == BRAIN:  # onnxruntime has no Add for it on the CPU
        nodes = [helper.make_node(opschema.NAME, ["X", "D", "Y1"], ["Y"], name="branch", domain=opschema.DOMAIN)]
    empty = helper.make_tensor("D", element, [0, 0, 0], [])
    initializers = [empty] if element == BRAIN else [empty, zero]
    made = helper.make_graph(nodes, "g", inputs, [value("Y", element, [*rows, n])], initializers)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(opschema.DOMAIN, opschema.VERSION)]
    return helper.make_model(made, functions=[opschema.function()], opset_imports=imports, ir_version=8)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """opened(model, …) is a session on it, as the package opens one."""

    def get(model: onnx.ModelProto, **options: Any) -> Any:
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return runtime.session(path, **options)

    return get


def plain(model: onnx.ModelProto) -> Any:
    """A session without the library."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def values(lead: tuple[int, ...], k: int, n: int, num_blocks: int, dtype: Any = np.float32) -> dict[str, Array]:
    random = np.random.default_rng(0)
    sizes = {"X": (*lead, k), "D": BlockShape.for_linear(k, n, num_blocks).blocks, "Y1": (*lead, n)}
    return {name: random.normal(size=size).astype(np.float32).astype(dtype) for name, size in sizes.items()}


def reference(feeds: dict[str, Array]) -> Array:
    """In double, of the numbers as stored."""
    x, d, y = (feeds[name].astype(np.float64) for name in ("X", "D", "Y1"))
    return apply(x, d, y.shape[-1], y)


def run(session: Any, feeds: dict[str, Array]) -> Array:
    """Runs any dtype, also those that onnxruntime's numpy interface does not know."""
    if feeds["X"].dtype != ml_dtypes.bfloat16:
        return np.asarray(session.run(None, feeds)[0])
    given = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BRAIN)
        if array.dtype == ml_dtypes.bfloat16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in feeds.items()
    }
    binding = session.io_binding()
    for name, value in given.items():
        binding.bind_ortvalue_input(name, value)
    out = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(feeds["Y1"].shape, np.uint16), BRAIN)
    binding.bind_ortvalue_output("Y", out)
    session.run_with_iobinding(binding)
    # numpy() refuses bfloat16, so the buffer is read where it lies
    size = int(np.prod(feeds["Y1"].shape))
    raw = np.ctypeslib.as_array((ctypes.c_uint16 * size).from_address(out.data_ptr())).copy()
    return np.asarray(raw.view(ml_dtypes.bfloat16).reshape(feeds["Y1"].shape))


@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize(("lead", "k", "n", "num_blocks"), CASES)
def test_numbers(opened: Any, element: int, lead: tuple[int, ...], k: int, n: int, num_blocks: int) -> None:
    dtype, rounding = TYPES[element]
    feeds = values(lead, k, n, num_blocks, dtype)
    got, wanted = run(opened(graph(len(lead), k, n, element)), feeds), reference(feeds)
    assert got.dtype == dtype
    error = np.abs(got.astype(np.float64) - wanted)
    # float32 sums: at most 300 products near 1, each added with 2⁻²⁴ of a sum near 20: 1e-5 of the largest output
    assert np.all(error <= rounding * np.abs(wanted) + 1e-5 * np.abs(wanted).max()), error.max()
    if element == FLOAT:
        assert np.linalg.norm(error) <= 1e-5 * np.linalg.norm(wanted)


def stored_graph(k: int, n: int, element: int, stored: int) -> onnx.ModelProto:
    """Y = BlockDiagMatMul[Int8](X, D[, S], Y1), D and S overridable initializers that are empty by default."""
    value = helper.make_tensor_value_info
    int8 = stored == TensorProto.INT8
    name = opschema.NAME_INT8 if int8 else opschema.NAME
    names: list[tuple[str, int, list[str | int | None]]] = [
        ("X", element, ["m", k]),
        ("D", stored, ["b", "i", "o"]),
        ("S", FLOAT, ["s"]),
        ("Y1", element, ["m", n]),
    ]
    inputs = [value(*one) for one in names if int8 or one[0] != "S"]
    node = helper.make_node(name, [one.name for one in inputs], ["Y"], domain=opschema.DOMAIN)
    empty = [helper.make_tensor("D", stored, [0, 0, 0], [])] + [helper.make_tensor("S", FLOAT, [0], [])] * int8
    made = helper.make_graph([node], "g", inputs, [value("Y", element, ["m", n])], empty)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(opschema.DOMAIN, opschema.VERSION)]
    functions = [opschema.function(name=name)]
    return helper.make_model(made, functions=functions, opset_imports=imports, ir_version=8)


def stored_values(lead: tuple[int, ...], k: int, n: int, num_blocks: int, dtype: Any, stored: Any) -> dict[str, Array]:
    """Blocks as they are stored, and for int8 their scales."""
    feeds = values(lead, k, n, num_blocks, dtype)
    if stored != np.int8:
        return {**feeds, "D": feeds["D"].astype(stored)}
    random = np.random.default_rng(1)
    codes = random.integers(-127, 128, feeds["D"].shape).astype(np.int8)
    return {**feeds, "D": codes, "S": random.uniform(0.001, 0.02, num_blocks).astype(np.float32)}


def stored_reference(feeds: dict[str, Array]) -> Array:
    scales = feeds["S"].astype(np.float64)[:, None, None] if "S" in feeds else 1.0
    return reference({**feeds, "D": feeds["D"].astype(np.float64) * scales})


@pytest.mark.parametrize(
    ("element", "stored"), [(FLOAT, np.float16), (FLOAT, np.int8), (HALF, np.int8), (BRAIN, np.float16)]
)
@pytest.mark.parametrize(("rows", "k", "n", "num_blocks"), [(1, 896, 896, 64), (3, 65, 64, 4), (150, 300, 530, 2)])
def test_blocks_are_read_as_stored(
    opened: Any, element: int, stored: Any, rows: int, k: int, n: int, num_blocks: int
) -> None:
    dtype, rounding = TYPES[element]
    if BlockShape.for_linear(k, n, num_blocks).num_blocks != num_blocks:
        pytest.fail("a case whose block count is not what it says")
    onnx_type = {np.float16: HALF, np.int8: TensorProto.INT8}[stored]
    feeds = stored_values((rows,), k, n, num_blocks, dtype, stored)
    got = run(opened(stored_graph(k, n, element, onnx_type)), feeds)
    wanted = stored_reference(feeds)
    error = np.abs(got.astype(np.float64) - wanted)
    assert np.all(error <= rounding * np.abs(wanted) + 1e-5 * np.abs(wanted).max()), error.max()  # as in test_numbers


@pytest.mark.parametrize("stored", [np.float16, np.int8])
def test_the_body_reads_stored_blocks_the_same(opened: Any, stored: Any) -> None:
    onnx_type = {np.float16: HALF, np.int8: TensorProto.INT8}[stored]
    model, feeds = stored_graph(60, 40, FLOAT, onnx_type), stored_values((5,), 60, 40, 4, np.float32, stored)
    with_library, without = run(opened(model), feeds), run(plain(model), feeds)
    assert np.linalg.norm(with_library - without) <= 1e-5 * np.linalg.norm(without)
    base = {name: feeds[name] for name in ("X", "Y1")}
    assert np.array_equal(run(opened(model), base), feeds["Y1"])  # no adapter, and no scales


def test_scales_that_do_not_fit_are_explained(opened: Any) -> None:
    feeds = stored_values((5,), 16, 12, 4, np.float32, np.int8)
    session = opened(stored_graph(16, 12, FLOAT, TensorProto.INT8))
    with pytest.raises(Exception, match=r"BlockDiagMatMulInt8: S does not have one scale for each block.*S \(3\), Y0"):
        run(session, {**feeds, "S": feeds["S"][:3]})


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(opened: Any, threads: int) -> None:
    feeds = values((300,), 512, 512, 4)  # cut into pieces by blocks and columns
    assert np.array_equal(
        run(opened(graph(1, 512, 512), threads=threads), feeds), run(opened(graph(1, 512, 512), threads=1), feeds)
    )


@pytest.mark.parametrize(("lead", "k", "n", "num_blocks"), CASES)
def test_the_body_says_the_same(opened: Any, lead: tuple[int, ...], k: int, n: int, num_blocks: int) -> None:
    feeds, model = values(lead, k, n, num_blocks), graph(len(lead), k, n)
    with_library, without = run(opened(model), feeds), run(plain(model), feeds)
    assert np.linalg.norm(with_library - without) <= 1e-5 * np.linalg.norm(without)  # float32, other orders of summing
    del feeds["D"]  # no adapter: not a sum at all
    assert np.array_equal(run(opened(model), feeds), feeds["Y1"])
    assert np.array_equal(run(plain(model), feeds), feeds["Y1"])


def test_the_library_takes_the_place_of_the_body(tmp_path: Path) -> None:
    """Not one of the body's nodes runs, and the branch is a node again."""
    model, feeds = graph(1, 64, 64), values((4,), 64, 64, 4)

    def executed(register: bool) -> set[str]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile_{register}")
        if register:
            runtime.register(options)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
        return {e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})}

    assert executed(register=True) == {"Add", opschema.NAME}
    body = executed(register=False)
    assert opschema.NAME not in body
    assert "If" in body


def test_it_is_registered_once(library: Path) -> None:
    options = ort.SessionOptions()
    assert runtime.register(options) == library
    assert runtime.register(options) == library  # a second registration is refused, as below
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(graph(1, 8, 8).SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_adapters_of_any_block_count_swap_in_one_session(opened: Any, tmp_path: Path) -> None:
    session, feeds = opened(graph(1, 48, 24)), values((3,), 48, 24, 4)
    base = {name: feeds[name] for name in ("X", "Y1")}
    for num_blocks in (4, 24, 1, 5):
        blocks = values((3,), 48, 24, num_blocks)["D"]
        file, path = ort.AdapterFormat(), tmp_path / f"{num_blocks}.onnx_adapter"
        file.set_parameters({"D": ort.OrtValue.ortvalue_from_numpy(blocks)})
        file.export_adapter(str(path))
        (tuned,) = runtime.run(session, base, runtime.load_adapter(path))
        np.testing.assert_allclose(tuned, reference({**base, "D": blocks}), rtol=0, atol=1e-5)  # 48 products near 1
        assert np.array_equal(runtime.run(session, base)[0], base["Y1"])


def resident_kilobytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * (os.sysconf("SC_PAGE_SIZE") // 1024)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux shows it")
def test_a_thousand_swaps_keep_no_memory(opened: Any, tmp_path: Path) -> None:
    """Two adapters of 600 kB take turns in one session: one of them left behind every time would be 600 MB."""
    session, feeds = opened(graph(1, 896, 896)), values((3,), 896, 896, 4)
    base = {name: feeds[name] for name in ("X", "Y1")}
    adapters = []
    for num_blocks in (4, 7):
        file, path = ort.AdapterFormat(), tmp_path / f"{num_blocks}.onnx_adapter"
        blocks = values((3,), 896, 896, num_blocks)["D"]
        file.set_parameters({"D": ort.OrtValue.ortvalue_from_numpy(blocks)})
        file.export_adapter(str(path))
        adapters.append((path, reference({**base, "D": blocks})))
    for swap in range(1000):
        path, wanted = adapters[swap % 2]
        (tuned,) = runtime.run(session, base, runtime.load_adapter(path))
        if swap % 100 < 2:
            np.testing.assert_allclose(tuned, wanted, rtol=0, atol=1e-3)  # up to 224 products near 1, summed in float32
        if swap == 99:  # all arenas have grown by now
            before = resident_kilobytes()
    assert resident_kilobytes() - before < 8 * 1024  # 900 swaps; what malloc keeps of its own moves by a MB or two


@pytest.mark.parametrize("element", [FLOAT, HALF])  # onnxruntime's Python cannot hold an empty bfloat16 tensor
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 0)])
def test_no_rows(opened: Any, element: int, lead: tuple[int, ...]) -> None:
    feeds = values(lead, 8, 8, 2, TYPES[element][0])
    assert run(opened(graph(len(lead), 8, 8, element)), feeds).shape == (*lead, 8)


def test_y0_with_another_reader_is_left_alone(opened: Any) -> None:
    model = graph(1, 16, 16)
    model.graph.output.append(helper.make_tensor_value_info("Y0", FLOAT, ["m0", 16]))
    feeds = values((5,), 16, 16, 4)
    y, y0 = opened(model).run(["Y", "Y0"], feeds)
    assert np.array_equal(y0, feeds["Y1"])
    np.testing.assert_allclose(y, reference(feeds), rtol=0, atol=1e-5)


def test_shapes_that_do_not_fit_are_explained(opened: Any) -> None:
    session, feeds = opened(graph(1, 16, 12)), values((5,), 16, 12, 4)
    with pytest.raises(Exception, match=r"block_size_in is below .*X has shape \(5, 16\), D \(4, 3, 3\), Y0 \(5, 12\)"):
        run(session, {**feeds, "D": feeds["D"][:, :3]})
    with pytest.raises(Exception, match=r"block_size_out is below .*D \(4, 4, 2\)"):
        run(session, {**feeds, "D": np.ascontiguousarray(feeds["D"][:, :, :2])})


@pytest.mark.parametrize("place", ["environment", "package", "checkout"])
def test_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Path, place: str) -> None:
    """The variable wins over what lies beside the package, and that over a checkout's build."""
    monkeypatch.delenv(runtime.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "diablo_export" / "runtime.py"))
    assert runtime.find_library() is None
    places = {
        "checkout": tmp_path / "kernels" / "build" / library.name,
        "package": tmp_path / "diablo_export" / "kernels" / library.name,
        "environment": tmp_path / "elsewhere.so",
    }
    for name, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if name == "environment":
            monkeypatch.setenv(runtime.LIBRARY_VARIABLE, str(path))
        if name == place:
            assert runtime.find_library() == path
            break
    for words in ("DIABLO_KERNELS", "beside the package", "kernels/build", "cmake --build"):
        assert words in runtime.LIBRARY_HELP


def test_a_variable_that_names_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.LIBRARY_VARIABLE, "/no/such/library.so")
    with pytest.raises(InputError, match=r"DIABLO_KERNELS=/no/such/library\.so: no such file"):
        runtime.find_library()
