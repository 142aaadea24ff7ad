"""Shared fixtures: tiny real models, made once per test run, and the real ones where they are at hand."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a broken test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from click.testing import CliRunner, Result

from tests import packed, tiny


@pytest.fixture(autouse=True)
def quiet_for_one_test() -> Iterator[None]:
    """What a test silences with `--quiet` is heard again by those that follow."""
    yield
    log = logging.getLogger("diablo_export")
    if log.level > logging.INFO:
        log.setLevel(logging.INFO)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model("llama") is the folder of a tiny random Llama; names are in tests/tiny.py. Do not change its files."""
    return functools.cache(lambda name: tiny.make_model(name, tmp_path_factory.mktemp(name) / "model"))


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_adapter("llama") is the folder of a random adapter (4 blocks, every layer) for tiny_model("llama")."""
    return functools.cache(lambda name: tiny.make_adapter(tiny_model(name), tmp_path_factory.mktemp(name) / "adapter"))


@pytest.fixture(scope="session")
def quantized(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """quantized("awq"): the tiny Llama in this format of tests/packed.py."""

    @functools.cache
    def get(name: str) -> Path:
        config, quantize, _, _ = packed.FORMATS[name]
        return packed.make(tiny_model("llama"), tmp_path_factory.mktemp(name) / "model", config, quantize)

    return get


@pytest.fixture(scope="session")
def other_adapter(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """other_adapter("llama"): another adapter for the same model, of 8 blocks, on its last layer, another head."""
    return functools.cache(
        lambda name: tiny.make_other_adapter(tiny_model(name), tmp_path_factory.mktemp(name) / "other")
    )


@pytest.fixture(scope="session")
def genai_graph(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """genai_graph("llama", "int4") is the model.onnx of onnxruntime-genai's own builder, q, k and v in one weight."""

    @functools.cache
    def get(architecture: str, precision: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{architecture}-{precision}")
        return tiny.build_with_genai(tiny_model(architecture), folder, precision)

    return get


@pytest.fixture(scope="session")
def peft_adapters(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA, DoRA, and LoRA with the strength of rank-stabilized LoRA and of single modules, of the tiny Llama."""
    from tests import foreign

    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("peft")
    return {
        "lora": foreign.make_peft(model, folder / "lora"),
        "dora": foreign.make_peft(model, folder / "dora", use_dora=True),
        "rslora": foreign.make_peft(model, folder / "rslora", use_rslora=True),
        "alpha": foreign.make_peft(model, folder / "alpha", alpha_pattern={"q_proj": 24}),
    }


@pytest.fixture(scope="session")
def built(
    tiny_model: Callable[[str], Path], peft_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """built("lora") is what the builder makes of the tiny Llama and this adapter; built() of the base."""

    @functools.cache
    def make(adapter: str | None, precision: str) -> Path:
        from tests import foreign

        options = [f"adapter_path={peft_adapters[adapter]}"] if adapter else []
        folder = tmp_path_factory.mktemp("built") / f"{adapter}-{precision}"
        # its float16 for the CPU fails there when it decodes; the one for CUDA runs on a CPU, too
        provider = "cuda" if precision == "fp16" else "cpu"
        return foreign.build(tiny_model("llama"), folder, precision, *options, provider=provider)

    return lambda adapter=None, precision="fp32": make(adapter, precision)  # the same, however it is asked for


@pytest.fixture(scope="session")
def exported(
    tiny_model: Callable[[str], Path],
    tiny_adapter: Callable[[str], Path],
    other_adapter: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """exported("llama", "int4"): the branch export of a tiny model with its adapters a and b. Do not change it."""

    @functools.cache
    def make(architecture: str, quantize: str, for_: str, block_dtype: str | None) -> Path:
        from diablo_export.converters.export import export

        folder = tmp_path_factory.mktemp(f"{architecture}-{quantize}-{for_}-{block_dtype}") / "branch"
        adapters = {"a": tiny_adapter(architecture), "b": other_adapter(architecture)}
        export(tiny_model(architecture), adapters, folder, quantize=quantize, for_=for_, block_dtype=block_dtype)
        return folder

    def get(architecture: str, quantize: str = "none", for_: str = "ort", block_dtype: str | None = None) -> Path:
        return make(architecture, quantize, for_, block_dtype)  # the same, however it is asked for

    return get


@pytest.fixture(scope="session")
def patched(
    genai_graph: Callable[..., Path], tiny_adapter: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with an int4 base, what it becomes when merged, and update.patch. Do not change it."""
    from diablo_export import patch
    from diablo_export.converters.merge import merge

    root = tmp_path_factory.mktemp("patch")
    shutil.copytree(genai_graph("llama", "int4").parent, root / "base", ignore=shutil.ignore_patterns("cache"))
    (root / "base" / "parity.json").write_text("{}")  # speaks of the base, not of what it becomes
    merge(root / "base", tiny_adapter("llama"), root / "merged", method="rtn")
    patch.create(root / "base", root / "merged", root / "update.patch")
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models and data that DIABLO_EXPORT_TEST_DATA names; not set, it skips, except in CI."""
    value = os.environ.get("DIABLO_EXPORT_TEST_DATA")
    if not value:
        if os.environ.get("CI"):
            pytest.fail("DIABLO_EXPORT_TEST_DATA is not set: CI must run the tests on real models")
        pytest.skip("set DIABLO_EXPORT_TEST_DATA to a folder with the real models and data sets to run this")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"DIABLO_EXPORT_TEST_DATA={value} is no folder")
    return folder


@pytest.fixture
def run() -> Callable[..., Result]:
    """run("merge", "--model", …) runs the command line in this process and returns its result."""
    from diablo_export.cli import main

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


@pytest.fixture(scope="session")
def library() -> Path:
    """The kernel library; without one it skips, except in CI, which must have built it."""
    from diablo_export import runtime

    found = runtime.find_library()
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(runtime.LIBRARY_HELP)
        pytest.skip(runtime.LIBRARY_HELP)
    return found
