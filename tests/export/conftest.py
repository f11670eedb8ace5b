"""What the exporter's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedge.export import pipeline
from embedge.export.calibration.texts import packaged_texts


@pytest.fixture(scope="module")
def one_core() -> bool:
    return True


@pytest.fixture(scope="module")
def texts_for_ranges() -> int:
    """Most texts that ranges of 8-bit vectors are taken from; the tests of what is written take all."""
    return 4


@pytest.fixture(scope="module", autouse=True)
def _ranges_of_few_texts(texts_for_ranges: int) -> Iterator[None]:
    """A graph runs over them at the end of each export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_RANGE_TEXTS", texts_for_ranges)
        yield


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of calibration texts, for tests of what does not depend on how many there are."""
    file = tmp_path_factory.mktemp("texts") / "few-texts.txt"
    file.write_text("\n".join(packaged_texts()[:20]), "utf-8")
    return file
