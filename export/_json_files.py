"""Reading the JSON files of model and adapter folders, with errors that name the file.

Stricter than Python's reader where a file could mean two things, or stop what reads it: a key with two
values, whole numbers beyond any float, half of a surrogate pair, and more nesting than settings have are no
JSON here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedge.export._errors import ExportError
from embedge.runtime._files import TOKENIZER_BYTES, read_regular_file

__all__ = ["parse_json", "read_json", "read_json_object"]

_MOST_DIGITS = 300  # floats end at 10**308
_MOST_LEVELS = 64


def parse_json(content: bytes) -> Any:
    """Return the value that UTF-8 JSON holds.

    Raises:
        ValueError: if it is not JSON by the rules at the top of this module.
    """
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unambiguous, parse_int=_whole
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {_MOST_LEVELS} levels") from None
    level, depth = [value], 0
    while level:
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        depth += 1
        if depth > _MOST_LEVELS:
            raise ValueError(f"nested deeper than {_MOST_LEVELS} levels")
    if b"\\u" in content:  # surrogates can only be written so
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        for key, value in pairs:
            if content[key] is not value and content[key] != value:
                raise ValueError(f"the key {key!r} occurs twice, with different values")
    return content


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_json(path: Path, error: type[ExportError]) -> Any:
    """Return the parsed content of the JSON file at ``path``.

    Raises:
        ExportError: as ``error``, if the file cannot be read or is not JSON in UTF-8.
    """
    try:
        content = read_regular_file(path, TOKENIZER_BYTES)  # tokenizer.json is the largest
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    try:
        return parse_json(content)
    except ValueError as problem:  # JSONDecodeError and UnicodeError
        raise error(f"{path}: is not JSON: {problem}; fetch or save the file again") from problem


def read_json_object(path: Path, error: type[ExportError]) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``; other JSON is refused like broken JSON."""
    content = read_json(path, error)
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
