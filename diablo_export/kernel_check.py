"""Whether onnxruntime and the kernel library work on this machine: `python -m diablo_export.kernel_check`.

Prints JSON objects, a line each, as it finds them, and `doctor` reads them: a library that is damaged can take the
process down that loads it, and what was found before is then known all the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from diablo_export import opschema, runtime
from diablo_export.blockdiag import Array, apply
from diablo_export.errors import InputError, require

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_ROWS, _IN, _OUT, _BLOCKS = 3, 64, 48, 4


def checks() -> Iterator[dict[str, Any]]:
    """What works, piece by piece.

    `onnxruntime` and `providers` that it was built with, `usable` those that open a session here; `body_error` the
    largest error of the operator as a function in standard operators; `library` and what it is, `kernel_error` by
    provider. `error` instead of what failed; `reason` where there is no library.
    """
    ort = require("onnxruntime", "cpu")
    providers = ort.get_available_providers()
    yield {"onnxruntime": ort.__version__, "providers": providers}
    feeds = _feeds()
    yield {"usable": [name for name in providers if name == CPU or _opens(name)]}
    yield {"body_error": _error(_session(one_node(opschema.function()), CPU, library=False), feeds)}
    library = runtime.find_library()
    yield {"library": str(library) if library else None, **({} if library else {"reason": runtime.why_no_library()})}
    if library is None:
        return
    about = runtime.describe_library(library)
    yield {"about": about}
    errors = {}
    for provider in [CPU, CUDA] if about.get("cuda") and CUDA in providers and _opens(CUDA) else [CPU]:
        errors[provider] = _error(_session(one_node(_wrong_body()), provider, library=True), feeds)
    yield {"kernel_error": errors}


def _feeds() -> dict[str, Array]:
    random = np.random.default_rng(0)
    shapes = {"X": (_ROWS, _IN), "D": (_BLOCKS, _IN // _BLOCKS, _OUT // _BLOCKS), "Y0": (_ROWS, _OUT)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _wrong_body() -> Any:
    """A body that leaves the blocks out: only a kernel gives the right numbers."""
    parser = require("onnx", "cpu").parser
    text = f'<domain: "{opschema.DOMAIN}", opset_import: ["" : 18]> {opschema.NAME} (X, D, Y0) => (Y)'
    return parser.parse_function(text + "{ Y = Identity (Y0) }")


def one_node(body: Any) -> bytes:
    """The operator alone in a model, inputs X, D and Y0, with this function as its body."""
    onnx = require("onnx", "cpu")
    float32, value = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    shapes = {"X": ["rows", _IN], "D": ["blocks", "in", "out"], "Y0": ["rows", _OUT]}
    node = onnx.helper.make_node(opschema.NAME, list(opschema.INPUTS), ["Y"], domain=opschema.DOMAIN)
    inputs = [value(name, float32, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph([node], "check", inputs, [value("Y", float32, shapes["Y0"])])
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(opschema.DOMAIN, opschema.VERSION)]
    made = onnx.helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=opschema.MIN_IR_VERSION)
    return bytes(made.SerializeToString())


def _session(model: bytes, provider: str, *, library: bool) -> Any:
    ort = require("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is reported
    options.intra_op_num_threads = 1
    if library:
        runtime.register(options)
    return ort.InferenceSession(model, options, providers=[provider])


def _error(session: Any, feeds: dict[str, Array]) -> float:
    """The largest distance from the numpy reference in double."""
    x, d, y0 = (feeds[name].astype(np.float64) for name in opschema.INPUTS)
    got = session.run(None, feeds)[0]
    return float(np.abs(got - apply(x, d, y0.shape[-1], y0)).max())


def _opens(provider: str) -> bool:
    """Whether a session gets this provider; onnxruntime falls back to the CPU without raising."""
    try:
        return provider in _session(one_node(opschema.function()), provider, library=False).get_providers()
    except Exception:  # or it does raise, one of a dozen kinds without a common base
        return False


def main() -> None:
    """Print the findings, a line each; what fails ends them with an `error`."""
    try:
        for found in checks():
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
    except InputError as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
    except Exception as error:  # onnxruntime's own kinds, for a library that it cannot register
        sys.stdout.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")


if __name__ == "__main__":
    main()
