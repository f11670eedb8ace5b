from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.runtime.conftest import TinyBundle, bundles_in

if TYPE_CHECKING:  # a module of tests that needs it is skipped where its packages are missing
    from tests.helpers.serving import Client


@pytest.fixture(scope="session")
def tasks_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """Two tasks with prompts and declared dimensions."""
    return bundles_in(tmp_path_factory.mktemp("served"))(
        "bundle",
        tasks=("retrieval", "code"),
        prompts={"query": "query: ", "passage": "passage: "},
        model={"matryoshka_dims": [2, 4, 8]},
    )


@pytest.fixture(scope="session")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """A task, a vision tower, and a vector a token."""
    return bundles_in(tmp_path_factory.mktemp("images"))("images", images=True)


@pytest.fixture(scope="module")
def client(tasks_bundle: TinyBundle) -> Iterator[Client]:
    """Of the bundle with two tasks, as ``bundle``."""
    from tests.helpers.serving import served

    with served(str(tasks_bundle.path)) as client:
        yield client


@pytest.fixture(scope="module")
def image_client(image_bundle: TinyBundle) -> Iterator[Client]:
    """Of the bundle with images, as ``images``."""
    pytest.importorskip("PIL")
    from tests.helpers.serving import served

    with served(str(image_bundle.path)) as client:
        yield client


@pytest.fixture
def copied(tasks_bundle: TinyBundle, tmp_path: Path) -> Path:
    """A copy of the bundle with two tasks, to be replaced."""
    return Path(shutil.copytree(tasks_bundle.path, tmp_path / "bundle"))
