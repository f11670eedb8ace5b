"""What a manifest says of the files of a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def file_entries(folder: Path) -> dict[str, Any]:
    """The manifest's ``files`` for everything in a folder."""
    return {
        file.relative_to(folder).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }
