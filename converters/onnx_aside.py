"""What else would change with a weight of an ONNX graph: initializers that have bytes in common with it."""

from __future__ import annotations

import os.path

import onnx_ir as ir


def bytes_in_common(graph: ir.Graph) -> dict[str, str]:
    """Which initializers lie, in a data file, in bytes that another one lies in too, and the name of that one."""
    spans = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes:
            start = tensor.offset or 0
            spans.append((os.path.normpath(tensor.location), start, start + tensor.nbytes, str(name)))
    found: dict[str, str] = {}
    last = ("", 0, 0, "")  # of those before, the one that reaches furthest
    for span in sorted(spans):
        if span[0] == last[0] and span[1] < last[2]:
            found[span[3]] = last[3]
            found.setdefault(last[3], span[3])
        last = max(last, span, key=lambda one: (one[0], one[2]))
    return found
