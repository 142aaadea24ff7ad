"""The example page in a browser, used as a person would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.runtimes import tools
from tests.runtimes.reference import wanted

pytestmark = pytest.mark.runtimes
Get = Callable[..., Path]


def test_it_writes_with_each_adapter_and_marks_what_changed(exported: Get) -> None:
    prompt, count = "the cat sat on", 8
    folder = exported("llama", for_="web")
    found = tools.browser(folder, page={"prompt": prompt, "count": count})
    assert not found["errors"]
    page = found["found"]
    assert page["status"] == "Done. The marked text is what the adapter changed."
    assert not page["wide"], "nothing may stick out of the window"
    assert [column["title"] for column in page["columns"].values()] == ["Base, no adapter", "Adapter a", "Adapter b"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    texts = {}
    for name, column in page["columns"].items():
        tokens = wanted(exported("llama"), name, count, ids).tokens
        assert column["tokens"] == tokens
        texts[name] = column["same"] + column["changed"]
        assert column["given"] + texts[name] == tokenizer.decode([*ids, *tokens])
    base = texts.pop("base")
    assert page["columns"]["base"]["changed"] == ""
    for name, text in texts.items():
        assert text != base and page["columns"][name]["changed"] and base.startswith(page["columns"][name]["same"])


def test_it_says_what_is_wrong(tmp_path: Path) -> None:
    found = tools.browser(tmp_path, page={"prompt": "the cat", "count": 1})
    assert "diablo_export.json: 404" in found["found"]["status"]
