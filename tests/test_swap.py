"""Adapters swapped in one session: on a graph of one branch, and on an exported decoder."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from diablo_export import runtime
from diablo_export.block_storage import BASE_KEY, MARKED, base_mark
from diablo_export.blockdiag import Array, apply
from diablo_export.errors import ExportError, InputError
from diablo_export.swap import SwapAdapter, write_adapter
from tests.branch_graphs import BASE, OTHER_BASE, adapter_file, graph_file, random_blocks
from tests.onnx_runs import feeds

Get = Callable[..., Path]
X = np.random.default_rng(1).normal(size=(3, 48)).astype(np.float32)
CLOSE = 1e-5  # float32 sums of at most 12 products of order 1


def wanted(blocks: Array) -> Array:
    """What the graph of tests/branch_graphs.py gives: x plus the branch."""
    return apply(X, blocks, 48, X)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    return runtime.session(graph_file(tmp_path / "model.onnx"), threads=1)


def load(tmp_path: Path, name: str, num_blocks: int = 4, **more: Any) -> tuple[SwapAdapter, Array]:
    blocks = random_blocks(num_blocks, seed=num_blocks)
    return runtime.load_adapter(adapter_file(tmp_path / f"{name}.onnx_adapter", {"m": blocks}, **more)), blocks


# ------------------------------------------------------------------------------------------------ one at a time


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = runtime.session(graph_file(tmp_path / "m.onnx"))
    assert [value.name for value in session.get_overridable_initializers()] == ["m.diablo_blocks"]
    assert capfd.readouterr() == ("", "")


def test_adapters_of_several_block_counts_in_one_session(opened: Any, tmp_path: Path) -> None:
    for count in (4, 8, 1, 24, 4):
        adapter, blocks = load(tmp_path, f"n{count}", count)
        assert adapter.names == {"m.diablo_blocks"} and adapter.base == base_mark(BASE)
        np.testing.assert_array_equal(adapter.values()["m.diablo_blocks"], blocks)
        tuned = runtime.run(opened, {"x": X}, adapter, outputs=["y"])[0]
        np.testing.assert_allclose(tuned, wanted(blocks), rtol=0, atol=CLOSE)
        assert np.array_equal(runtime.run(opened, {"x": X})[0], X), "nothing of it may stay behind"
    assert runtime.run_options(None) is None and runtime.run_options([]) is None


def test_options_keep_their_adapter(opened: Any, tmp_path: Path) -> None:
    options = runtime.run_options(load(tmp_path, "a")[0])  # nobody else has it
    tuned = opened.run(["y"], {"x": X}, options)[0]
    np.testing.assert_allclose(tuned, wanted(random_blocks(4, seed=4)), rtol=0, atol=CLOSE)


def test_an_adapter_does_not_silently_win_over_what_is_fed(opened: Any, tmp_path: Path) -> None:
    adapter, blocks = load(tmp_path, "a")
    for call in (runtime.run, runtime.bind):
        with pytest.raises(InputError, match=r"a\.onnx_adapter: sets inputs that are fed as well \(m\.diablo_blocks\)"):
            call(opened, {"x": X, "m.diablo_blocks": blocks}, adapter)


def test_an_adapter_of_another_model_is_named(opened: Any, tmp_path: Path) -> None:
    adapter = runtime.load_adapter(adapter_file(tmp_path / "a.onnx_adapter", {"other": random_blocks(4)}))
    with pytest.raises(InputError, match=r"sets 1 inputs that this model does not have \(other"):
        runtime.run(opened, {"x": X}, adapter)


def test_an_adapter_of_another_type_is_named(opened: Any, tmp_path: Path) -> None:
    half = random_blocks(4).astype(np.float16)
    adapter = runtime.load_adapter(adapter_file(tmp_path / "a.onnx_adapter", {"m": half}))
    with pytest.raises(InputError, match=r"m\.diablo_blocks is a tensor\(float16\), the model takes a tensor\(float\)"):
        runtime.run(opened, {"x": X}, adapter)


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.onnx_adapter: no such adapter file"):
        runtime.load_adapter(tmp_path / "gone.onnx_adapter")
    (tmp_path / "bad.onnx_adapter").write_bytes(b"x" * 64)
    with pytest.raises(InputError, match=r"bad\.onnx_adapter: not an \.onnx_adapter file"):
        runtime.load_adapter(tmp_path / "bad.onnx_adapter")


def test_what_onnxruntime_refuses_is_an_error_of_ours(opened: Any, tmp_path: Path) -> None:
    adapter, _ = load(tmp_path, "a")
    with pytest.raises(ExportError, match="onnxruntime cannot run the model"):
        runtime.run(opened, {"x": X[:, :7]}, adapter)


# -------------------------------------------------------------------------------------------------- I/O binding


def test_onnxruntime_itself_ignores_adapters_there(opened: Any, tmp_path: Path) -> None:
    """Why `bind` exists. When this fails, onnxruntime has learned it and the refusal can go."""
    adapter, _ = load(tmp_path, "a")
    options = ort.RunOptions()
    options.add_active_adapter(adapter.handle)
    binding = runtime.bind(opened, {"x": X})
    ort.InferenceSession.run_with_iobinding(opened, binding, options)
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], X)


def test_a_session_of_ours_refuses_them(opened: Any, tmp_path: Path) -> None:
    adapter, _ = load(tmp_path, "a")
    with pytest.raises(InputError, match=r"would give the base's output; bind the adapter: .*runtime\.bind\("):
        opened.run_with_iobinding(runtime.bind(opened, {"x": X}), runtime.run_options(adapter))
    opened.run_with_iobinding(runtime.bind(opened, {"x": X}), ort.RunOptions())  # without adapter as ever


def test_bound_adapters(opened: Any, tmp_path: Path) -> None:
    bindings = []
    for count in (4, 8):
        adapter, blocks = load(tmp_path, f"n{count}", count)
        bindings.append((runtime.bind(opened, {"x": X}, adapter, ["y"]), wanted(blocks)))
        del adapter, blocks  # what is bound must live as long as the binding
    bindings.append((runtime.bind(opened, {"x": ort.OrtValue.ortvalue_from_numpy(X)}), X))
    clutter = [np.full((4, 12, 12), 9, np.float32) for _ in range(50)]
    for binding, expected in bindings * 2:
        opened.run_with_iobinding(binding)
        np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], expected, rtol=0, atol=CLOSE)
    assert len(clutter) == 50


def test_inputs_are_bound_anew_between_runs(opened: Any, tmp_path: Path) -> None:
    adapter, blocks = load(tmp_path, "a")
    binding = runtime.bind(opened, {"x": X}, adapter)
    later = ort.OrtValue.ortvalue_from_numpy(X + 1)
    binding.bind_ortvalue_input("x", later)
    opened.run_with_iobinding(binding)
    expected = apply(X + 1, blocks, 48, X + 1)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], expected, rtol=0, atol=CLOSE)


def test_an_adapter_is_put_on_a_device_once(tmp_path: Path) -> None:
    adapter, _ = load(tmp_path, "a")
    first = adapter.on_device()
    assert adapter.on_device("cpu", 0) is first and first["m.diablo_blocks"].device_name() == "cpu"


# ------------------------------------------------------------------------------------------------------- the base


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    """The same names, sizes and types: only the weights under them differ."""
    mine = runtime.session(graph_file(tmp_path / "mine.onnx"))
    other = runtime.session(graph_file(tmp_path / "other.onnx", base=OTHER_BASE))
    adapter, _ = load(tmp_path, "a")
    runtime.run(mine, {"x": X}, adapter)
    for call in (runtime.run, runtime.bind):
        with pytest.raises(InputError, match=r"a\.onnx_adapter: was made for another base \(mark 0*1a\) than this"):
            call(other, {"x": X}, adapter)
    with pytest.raises(InputError, match="another base"):
        runtime.check_adapter(other, adapter)


def test_a_folder_is_checked_without_a_session(exported: Get, tmp_path: Path) -> None:
    """For onnxruntime-genai, which runs an adapter for another base without a word."""
    adapter = runtime.load_adapter(exported("llama", "int4") / "adapters/a.onnx_adapter")
    runtime.check_folder(exported("llama"), adapter)
    with pytest.raises(InputError, match="was made for another base"):
        runtime.check_folder(exported("qwen2"), adapter)
    with pytest.raises(InputError, match=r"diablo_export\.json: cannot be read"):
        runtime.check_folder(tmp_path, adapter)


@pytest.mark.parametrize(("model", "file"), [(BASE, None), (None, BASE), (None, None)])
def test_what_does_not_say_its_base_is_used_with_a_warning(
    model: str | None, file: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = runtime.session(graph_file(tmp_path / "m.onnx", base=model))
    adapter, blocks = load(tmp_path, "a", base=file)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tuned = runtime.run(session, {"x": X}, adapter)[0]
    np.testing.assert_allclose(tuned, wanted(blocks), rtol=0, atol=CLOSE)
    (record,) = caplog.records  # once, not at every run
    assert ("the model does" if file else r"a.onnx_adapter does") in record.getMessage()
    assert "not say which base it was made for" in record.getMessage()


def test_other_writers_files_carry_no_mark(tmp_path: Path) -> None:
    file = tmp_path / "theirs.onnx_adapter"
    theirs = ort.AdapterFormat()
    theirs.set_adapter_version(1)
    theirs.set_model_version(26)  # a number of theirs, not a mark
    theirs.set_parameters({"m.diablo_blocks": ort.OrtValue.ortvalue_from_numpy(random_blocks(4))})
    theirs.export_adapter(str(file))
    assert runtime.load_adapter(file).base is None
    write_adapter(file, {"m.diablo_blocks": random_blocks(4)}, 26)
    assert runtime.load_adapter(file).base == 26
    assert ort.AdapterFormat.read_adapter(str(file)).get_adapter_version() == MARKED < 2**31


def test_a_file_is_replaced_under_a_running_session(opened: Any, tmp_path: Path) -> None:
    """onnxruntime maps the file: written in place, the session would read the new bytes, or be killed."""
    adapter, blocks = load(tmp_path, "a")
    write_adapter(adapter.path, {"m.diablo_blocks": random_blocks(48)}, adapter.base)
    tuned = runtime.run(opened, {"x": X}, adapter)[0]
    np.testing.assert_allclose(tuned, wanted(blocks), rtol=0, atol=CLOSE)
    assert runtime.load_adapter(adapter.path).values()["m.diablo_blocks"].shape == (48, 1, 1)
    assert [path.name for path in tmp_path.glob("*adapter*")] == ["a.onnx_adapter"]


def test_checking_needs_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    model = graph_file(tmp_path / "m.onnx", base=OTHER_BASE)
    adapter = adapter_file(tmp_path / "a.onnx_adapter", {"m": random_blocks(4)})
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'torch', 'transformers', 'safetensors', 'ml_dtypes', 'xxhash', 'rich', "
        "'click'): sys.modules[name] = None\n"
        "from diablo_export import errors, runtime\n"
        "try: runtime.check_adapter(runtime.session(sys.argv[1]), runtime.load_adapter(sys.argv[2]))\n"
        "except errors.InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, model, adapter], capture_output=True, text=True, check=True)
    assert "was made for another base" in done.stdout


# ------------------------------------------------------------------------------------------------ several at once


def test_two_adapters_that_set_the_same_input(opened: Any, tmp_path: Path) -> None:
    a, b = load(tmp_path, "a")[0], load(tmp_path, "b", 8)[0]
    for call in (lambda: runtime.run(opened, {"x": X}, [a, b]), lambda: runtime.run_options([a, b])):
        with pytest.raises(InputError, match=r"a\.onnx_adapter, .*b\.onnx_adapter: 1 inputs are set by more than one"):
            call()
    with pytest.raises(InputError, match=r"their sum: runtime\.combine"):
        runtime.bind(opened, {"x": X}, [a, b])


def test_onnxruntime_itself_lets_one_of_them_win(opened: Any, tmp_path: Path) -> None:
    """Why that is an error here."""
    loaded = [load(tmp_path, name, count) for name, count in (("a", 4), ("b", 8))]
    options = ort.RunOptions()
    for adapter, _ in loaded:
        options.add_active_adapter(adapter.handle)
    got = opened.run(None, {"x": X}, options)[0]
    assert sum(np.allclose(got, wanted(blocks), rtol=0, atol=CLOSE) for _, blocks in loaded) == 1


def test_two_adapters_that_do_not(tmp_path: Path) -> None:
    session = runtime.session(graph_file(tmp_path / "two.onnx", modules=("m", "n")))
    blocks = {"m": random_blocks(4, 1), "n": random_blocks(8, 2)}
    both = [runtime.load_adapter(adapter_file(tmp_path / f"{n}.onnx_adapter", {n: v})) for n, v in blocks.items()]
    first = apply(X, blocks["m"], 48, X)
    expected = apply(first, blocks["n"], 48, first)
    np.testing.assert_allclose(runtime.run(session, {"x": X}, both)[0], expected, rtol=0, atol=10 * CLOSE)
    binding = runtime.bind(session, {"x": X}, both)
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], expected, rtol=0, atol=10 * CLOSE)


# --------------------------------------------------------------------------------------------- a decoder, and memory


def test_an_exported_decoder(exported: Get) -> None:
    """4 and 8 blocks, bound and unbound: the same bits, as the same kernels see the same numbers."""
    folder = exported("llama")
    session = runtime.session(folder / "model.onnx", threads=1)
    adapters = [runtime.load_adapter(folder / f"adapters/{name}.onnx_adapter") for name in ("a", "b")]
    given = feeds(session)
    unbound = {one: runtime.run(session, given, one, ["logits"])[0] for one in [None, *adapters]}
    assert np.abs(unbound[adapters[0]] - unbound[adapters[1]]).max() > 0.1
    for one in [*adapters, None, *adapters]:
        binding = runtime.bind(session, given, one, ["logits"])
        session.run_with_iobinding(binding)
        assert np.array_equal(binding.copy_outputs_to_cpu()[0], unbound[one])


def test_the_same_base_has_one_mark_however_it_is_exported(exported: Get) -> None:
    marks = set()
    for how in ((), ("int4",)):
        folder = exported("llama", *how)
        said = runtime.session(folder / "model.onnx").get_modelmeta().custom_metadata_map[BASE_KEY]
        marks |= {base_mark(said), runtime.load_adapter(folder / "adapters/b.onnx_adapter").base}
    assert len(marks) == 1
    other = runtime.load_adapter(exported("qwen2") / "adapters/a.onnx_adapter")
    assert other.base not in marks


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")
@pytest.mark.parametrize("way", ["run", "bind", "load"])
def test_a_thousand_swaps_take_no_memory(way: str, tmp_path: Path) -> None:
    """The adapters are 1.5 MB and 0.75 MB: losing one in twenty swaps would be 56 MB."""
    size = 1536
    session = runtime.session(graph_file(tmp_path / "m.onnx", size=size), threads=1)
    x = np.ones((1, size), np.float32)
    files = [
        adapter_file(tmp_path / f"{count}.onnx_adapter", {"m": random_blocks(count, size=size)}) for count in (6, 12)
    ]
    loaded = [runtime.load_adapter(file) for file in files]

    def swap(times: int) -> None:
        for index in range(times):
            one = runtime.load_adapter(files[index % 2]) if way == "load" else loaded[index % 2]
            if way == "bind":
                session.run_with_iobinding(runtime.bind(session, {"x": x}, one))
            else:
                runtime.run(session, {"x": x}, one)

    swap(100)  # onnxruntime's memory pools and Python's own fill
    before = resident()
    swap(1000)
    # a pool may still grow by a chunk: 8 MB, a seventh of the loss named above
    assert resident() - before < 8e6


def test_the_branch_graph_is_valid(tmp_path: Path) -> None:
    onnx.checker.check_model(graph_file(tmp_path / "m.onnx", modules=("m", "n")), full_check=True)
