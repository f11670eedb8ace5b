from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from tests.helpers.command import SetStdin


@pytest.fixture(scope="module")
def one_core() -> bool:
    return True


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> SetStdin:
    """Sets the bytes of standard input."""

    def replace(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    return replace
