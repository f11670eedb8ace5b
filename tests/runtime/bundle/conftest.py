from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def one_core() -> bool:
    return True
