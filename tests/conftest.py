"""Shared fixtures: tiny real models, made once per test run, and the real ones where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a broken test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from click.testing import CliRunner, Result

from tests import packed, tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model("llama") is the folder of a tiny random Llama; names are in tests/tiny.py. Do not change its files."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tiny.make_model(architecture, tmp_path_factory.mktemp(architecture) / "model")
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_adapter("llama") is the folder of a random adapter (4 blocks, every layer) for tiny_model("llama")."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture) / "adapter"
            made[architecture] = tiny.make_adapter(tiny_model(architecture), folder)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def quantized(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """quantized("awq"): the tiny Llama in this format of tests/packed.py."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            config, quantize, _, _ = packed.FORMATS[name]
            made[name] = packed.make(tiny_model("llama"), tmp_path_factory.mktemp(name) / "model", config, quantize)
        return made[name]

    return get


@pytest.fixture(scope="session")
def other_adapter(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """other_adapter("llama"): another adapter for the same model, of 8 blocks, on its last layer, another head."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture) / "other"
            made[architecture] = tiny.make_other_adapter(tiny_model(architecture), folder)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def genai_graph(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """genai_graph("llama", "int4") is the model.onnx of onnxruntime-genai's own builder, q, k and v in one weight."""
    made: dict[tuple[str, str], Path] = {}

    def get(architecture: str, precision: str) -> Path:
        if (architecture, precision) not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{precision}")
            made[architecture, precision] = tiny.build_with_genai(tiny_model(architecture), folder, precision)
        return made[architecture, precision]

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
    made: dict[tuple[str | None, str], Path] = {}

    def get(adapter: str | None = None, precision: str = "fp32") -> Path:
        if (adapter, precision) not in made:
            from tests import foreign

            options = [f"adapter_path={peft_adapters[adapter]}"] if adapter else []
            folder = tmp_path_factory.mktemp("built") / f"{adapter}-{precision}"
            # its float16 for the CPU fails there when it decodes; the one for CUDA runs on a CPU, too
            provider = "cuda" if precision == "fp16" else "cpu"
            made[adapter, precision] = foreign.build(
                tiny_model("llama"), folder, precision, *options, provider=provider
            )
        return made[adapter, precision]

    return get


@pytest.fixture(scope="session")
def exported(
    tiny_model: Callable[[str], Path],
    tiny_adapter: Callable[[str], Path],
    other_adapter: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """exported("llama", "int4"): the branch export of a tiny model with its adapters a and b. Do not change it."""
    made: dict[tuple[str, str, str, str | None], Path] = {}

    def get(architecture: str, quantize: str = "none", for_: str = "ort", block_dtype: str | None = None) -> Path:
        key = architecture, quantize, for_, block_dtype
        if key not in made:
            from diablo_export.converters.export import export

            folder = tmp_path_factory.mktemp("-".join(map(str, key))) / "branch"
            adapters = {"a": tiny_adapter(architecture), "b": other_adapter(architecture)}
            model = tiny_model(architecture)
            export(model, adapters, folder, quantize=quantize, for_=for_, block_dtype=block_dtype)
            made[key] = folder
        return made[key]

    return get


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
