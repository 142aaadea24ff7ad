"""By which method quantized weights take an adapter's blocks: asked for, usual, or possible on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo_export.adapter import Adapter
from diablo_export.algorithms import ALGORITHMS, HAVE_ZEROS
from diablo_export.base_grid import BITS
from diablo_export.checkpoint import Checkpoint
from diablo_export.console import log
from diablo_export.converters import onnx_file
from diablo_export.converters.trained_grid import grids, warn_of_another
from diablo_export.errors import CheckpointError, InputError

LAYERWISE = "layerwise"
METHODS = ("auto", "rtn", "refit", "calibrated", "distilled", LAYERWISE, *ALGORITHMS)
_NOTHING_ROUNDED = "--quantize none rounds nothing"


def check_values(
    method: str | None,
    calibration: object,
    min_survival: float,
    max_seconds: float,
    plan: object = None,
    max_bytes: int | None = None,
    seed: int = 0,
) -> None:
    """Refuse values that the options do not have.

    Raises:
        InputError: names all of them.
    """
    faults = []
    if method is not None and method not in METHODS:
        faults.append(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if not 0 < min_survival < 1:
        faults.append(f"min_survival is {min_survival}; it must be between 0 and 1, such as 0.97")
    if not max_seconds > 0:
        faults.append(f"max_seconds is {max_seconds}; it must be above 0")
    if plan is not None and method == LAYERWISE:
        faults.append("--plan runs the whole model, and --method layerwise never does; leave one of them out")
    if calibration is not None and plan is None and method == "rtn":
        faults.append("--calibration is not looked at by --method rtn; leave one of them out")
    if method in ALGORITHMS and plan is not None:
        faults.append(f"--method {method} quantizes all weights in one way, and takes no --plan; leave one of them out")
    if plan is not None and str(plan) != "auto" and method is not None:
        faults.append("--method is in the plan; leave it out")
    if max_bytes is not None and str(plan) != "auto":
        faults.append("--max-bytes is for --plan auto, which looks for a plan within it; leave it out")
    if max_bytes is not None and max_bytes < 1:
        faults.append(f"max_bytes is {max_bytes}; it must be above 0")
    faults += seed_faults(seed)
    if faults:
        raise InputError("; ".join(faults))


def seed_faults(seed: int) -> list[str]:
    """What is wrong with a seed, if anything: torch's generators take 64 bits, and seeds above this one are used."""
    return [] if 0 <= seed < 2**62 else [f"seed is {seed}; it must be at least 0 and below 2^62"]


def for_checkpoint(
    source: Checkpoint, quantize: str, method: str | None, calibration: Any, reference: Any, plan: Any
) -> str:
    """The method for a Hugging Face model.

    Raises:
        InputError: options that do not go together, or more than this machine has memory for.
    """
    if reference is not None:
        raise InputError("--reference is for an ONNX --model; a Hugging Face model is its own reference")
    if quantize == "none" and source.config.get("quantization_config"):
        return _for_packed(method, calibration, plan)
    if quantize == "none":
        _refuse_unused(method, calibration, plan, _NOTHING_ROUNDED)
        return "exact"
    if method == "hqq" and BITS[quantize] > 4:
        raise InputError(
            f"--method hqq has zero points between the codes, which onnxruntime takes at 4 and 2 bits and not at "
            f"{quantize}; choose k_quant, or --quantize int4"
        )
    chosen = method or ("auto" if BITS[quantize] <= 4 or plan is not None else "rtn")
    return _if_it_fits(source, chosen, _who_asks(method, plan))


def zero_points(method: str | None, asked: bool | None, usual: bool) -> bool:
    """Whether groups have zero points: as asked or usual, but always with an algorithm that chooses them.

    Raises:
        InputError: such an algorithm, and none asked for.
    """
    if method not in HAVE_ZEROS:
        return usual
    if asked is False:
        raise InputError(f"--method {method} chooses zero points; leave out --symmetric, or take gptq")
    return True


def for_onnx(
    source: onnx_file.OnnxModel,
    adapter: Adapter,
    method: str | None,
    calibration: Any,
    reference: str | Path | None,
    plan: Any,
) -> tuple[str, str | Path | None]:
    """The method for an ONNX model, and its reference in torch.

    Raises:
        InputError: options that do not go together, a reference that cannot be used though it is needed.
    """
    from diablo_export.converters.onnx_linears import linears

    if method in ALGORITHMS:
        raise InputError(
            f"--method {method} quantizes every weight of a float model, and {source.file.name} is what it is; give "
            "the Hugging Face folder and --quantize int4, or choose another method"
        )
    layers = linears(source.graph)
    warn_of_another([adapter], grids(layers))
    bits = {layer.bits for layer in layers if layer.bits}
    if not bits:
        _refuse_unused(method, calibration, plan, f"{source.file} holds no quantized weights")
        return "exact", None
    chosen = method or ("auto" if min(bits) <= 4 or plan is not None else "rtn")
    if chosen == "rtn" and plan is None:
        return "rtn", None
    asks, named = _who_asks(method, plan), reference or adapter.base_model
    try:
        if named is None:
            raise CheckpointError("the adapter does not name its base")
        checkpoint = Checkpoint.open(named)
        adapter.check_base(checkpoint)
        return _if_it_fits(checkpoint, chosen, asks), named
    except InputError as error:
        if asks or reference is not None:
            raise InputError(
                f"{asks or f'--method {chosen}'} runs the float model that {source.file.name} was made from, which "
                f"cannot be used: {error}. Give it as --reference, or choose --method rtn"
            ) from error
        log.warning(
            "rounded to the nearest, and what is left of the fine-tune not measured: the float model cannot be used "
            "(%s). Give it as --reference to keep the fine-tune", error,
        )  # fmt: skip
        return "rtn", None


def check_picture(picture: str | Path | None, unmeasured: str | None) -> None:
    """Refuse a picture that cannot be drawn; `unmeasured` is a method that measures nothing.

    Raises:
        InputError: such a method, another ending than .png and .svg, or no such folder.
    """
    if picture is None:
        return
    from diablo_export.measure.survival_picture import check_file

    check_file(picture)
    if unmeasured is not None:
        said = "this merge is exact" if unmeasured == "exact" else f"--method {unmeasured} does not measure that here"
        raise InputError(f"--picture shows what is left of each module's adapter, and {said}; leave it out")


def load(method: str) -> None:
    """Import the C++ libraries that the work ahead needs: before an output folder is begun."""
    from diablo_export.converters.onnx_graph import load_exporters

    load_exporters()
    if method in ALGORITHMS:
        import diablo_export.converters.float_road
    elif method != "rtn":
        import diablo_export.converters.grid_merge  # noqa: F401


def _for_packed(method: str | None, calibration: Any, plan: Any) -> str:
    """The method for a Hugging Face checkpoint that is quantized."""
    if calibration is not None or plan is not None or method not in (None, "refit", "rtn"):
        raise InputError(
            "a quantized Hugging Face checkpoint is merged by --method refit or rtn, which look at no text and take no "
            "plan; the others run the float model: give that, and --quantize int4"
        )
    return method or "refit"


def _refuse_unused(method: str | None, calibration: Any, plan: Any, why: str) -> None:
    """Nothing is rounded, so nothing needs a method."""
    if method is not None or calibration is not None:
        raise InputError(f"--method and --calibration are for quantized weights, and {why}; leave them out")
    if plan is not None:
        raise InputError(f"--plan is for quantized weights, and {why}; give --quantize int4, or leave it out")


def _who_asks(method: str | None, plan: Any) -> str | None:
    """The option that wants the float model run; None where it is only the default."""
    return f"--method {method}" if method is not None else "--plan" if plan is not None else None


def _if_it_fits(source: Checkpoint, method: str, asks: str | None) -> str:
    """The method; layerwise where the model does not fit in memory whole, or rtn where nobody asked for another."""
    from diablo_export.converters.sizes import memory_fault

    if method == "rtn" and asks != "--plan":
        return method
    fault = memory_fault(source, layerwise=method == LAYERWISE)
    if fault and method in ("auto", "distilled") and asks != "--plan" and memory_fault(source, layerwise=True) is None:
        log.warning("distilled layer by layer, as the model does not fit here whole: %s", fault)
        return LAYERWISE
    if fault and asks:
        raise InputError(f"{asks}: {fault}; use a machine with more memory, or --method rtn")
    if fault:
        log.warning("rounded to the nearest, and what is left of the fine-tune not measured: %s", fault)
    return "rtn" if fault else method
