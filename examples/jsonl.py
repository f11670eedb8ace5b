"""Files of one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file.

    Args:
        path: The file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name}: expected a file at {path}, found none; run examples/build_data.py first"
        )
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write ``rows`` and return how many there were.

    Args:
        path: The file; its folder is made where it is missing.
        rows: JSON objects.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
