"""JSON that somebody else may have written.

Stricter than Python's reader where a file could mean two things, or stop what reads it: a key with two
values, whole numbers beyond any float, half of a surrogate pair, and more nesting than settings have are no
JSON here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file
from embedge.runtime.errors import BundleError

__all__ = ["json_text", "parse_json", "read_json_object"]

_MOST_DIGITS = 300  # floats end at 10**308
_MOST_LEVELS = 64
_NUMBERS = re.compile(r"\[\n\s+([^\"\[\]{}]+)\n\s+\]")  # no text of a string has a bare line break


def parse_json(content: bytes) -> Any:
    """The value that UTF-8 JSON holds.

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


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a UTF-8 file.

    Raises:
        BundleError: if the file cannot be read, is no regular file or too large, is not JSON, or holds
            something else.
    """
    try:
        value = parse_json(read_regular_file(file, JSON_BYTES))
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeError
        raise BundleError(
            f"{file}: not valid JSON ({error}); copy or export the bundle again"
        ) from error
    if not isinstance(value, dict):
        raise BundleError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def json_text(value: Any) -> str:
    """JSON as bundles have it: indented by two, a list of numbers on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"
