"""What the names of a linear node and of its weight say of the module that they were made of, whoever wrote them."""

from __future__ import annotations

import functools
import re

_SAME_PART = {"self_attn": "attn"}  # what onnxruntime-genai's builder calls it


@functools.lru_cache(1 << 12)  # each module asks every layer
def said(node: str, weight: str) -> list[list[str]]:
    """The paths that a node's name and its weight's name give: the words before the operator's."""
    node = re.sub(r"/(MatMul|Gemm)\w*$", "", node)
    weight = re.sub(r"(\.MatMul)?\.weight\w*$", "", weight)
    return [parts_of(node), parts_of(weight)]


def parts_of(name: str) -> list[str]:
    """The path that a dotted or slashed name gives, with one word for what exporters call otherwise."""
    return [_SAME_PART.get(part, part) for part in re.split(r"[./]", name) if part]
