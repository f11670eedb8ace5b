"""A bundle of two tasks at four precisions, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from embedge.export import export_bundle
from tests.helpers.exports import (
    PRECISIONS,
    WIDE,
)
from tests.helpers.models import (
    make_model,
    save,
    save_adapter,
)


@pytest.fixture(scope="module")
def takes_ranges() -> bool:
    return True


@pytest.fixture(scope="module")
def one_core() -> bool:
    return False  # what is written is computed on all cores


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("bert", **WIDE), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def adapters(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(source, root / name, target=["query", "value"], seed=seed)
        for seed, name in enumerate(("first", "second"), 20)
    }


@pytest.fixture(scope="session")
def bundle(
    source: Path,
    adapters: dict[str, Path],
    few_texts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return export_bundle(
        source,
        adapters=adapters,
        precisions=PRECISIONS,
        calibration=few_texts,
        out=tmp_path_factory.mktemp("bundle") / "out",
        matryoshka_dims=[16, 32],
    )


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(bundle, tmp_path / "copy")
