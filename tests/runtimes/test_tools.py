"""Absent tools are told, and are failures where they are promised."""

from __future__ import annotations

import pytest

from tests.runtimes import tools


def test_a_skip_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIABLO_RUNTIMES", raising=False)
    tools.need("npm", True, "never said")
    with pytest.raises(pytest.skip.Exception, match="npm not found; run: make npm"):
        tools.need("npm", None, "run: make npm")


@pytest.mark.parametrize("promised", ["all", "kernels,npm"])
def test_what_is_promised_and_absent_fails(promised: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIABLO_RUNTIMES", promised)
    with pytest.raises(pytest.fail.Exception, match="npm not found; run: make npm"):
        tools.need("npm", None, "run: make npm")


def test_what_others_need_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIABLO_RUNTIMES", "kernels,compiler")
    with pytest.raises(pytest.skip.Exception):
        tools.need("npm", None, "run: make npm")
