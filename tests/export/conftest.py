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
def takes_ranges() -> bool:
    """Whether exports take the ranges of 8-bit vectors, for which a graph runs; the tests of what is written do."""
    return False


@pytest.fixture(scope="module", autouse=True)
def _ranges_are_left_out(takes_ranges: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not takes_ranges:
            patch.setattr(pipeline, "_calibrate_ranges", lambda texts, out, progress: None)
        yield


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of calibration texts, for tests of what does not depend on how many there are."""
    file = tmp_path_factory.mktemp("texts") / "few-texts.txt"
    file.write_text("\n".join(packaged_texts()[:20]), "utf-8")
    return file
