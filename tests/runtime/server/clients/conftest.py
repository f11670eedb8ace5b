"""Clients that others make, against the real process: `make test-clients` installs them, and sets where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.server_process import Server, serving
from tests.runtime.conftest import TinyBundle

CLIENTS = os.environ.get("EMBEDGE_CLIENTS")  # the folder they were installed into

if CLIENTS is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def clients() -> Path:
    """Where npm's packages are."""
    assert CLIENTS is not None
    return Path(CLIENTS)


@pytest.fixture(scope="session")
def server(tasks_bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of the bundle with two tasks, as ``bundle``, which takes requests with a key alone."""
    place = tmp_path_factory.mktemp("clients")
    (place / "keys").write_text("secret\n")
    arguments = (str(tasks_bundle.path), "--api-key-file", str(place / "keys"))
    with serving(place / "log", *arguments) as server:
        yield server
        assert server.end() == 0
