"""What the exporter's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedge.export.calibration.texts import packaged_texts


@pytest.fixture(scope="module")
def one_core() -> bool:
    return True


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of calibration texts, for tests of what does not depend on how many there are."""
    file = tmp_path_factory.mktemp("texts") / "few-texts.txt"
    file.write_text("\n".join(packaged_texts()[:20]), "utf-8")
    return file
