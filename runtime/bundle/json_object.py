"""JSON that somebody else may have written, and typed getters with the path of the bad key in every message.

Stricter than Python's reader where a file could mean two things, or stop what reads it: a key with two
values, whole numbers beyond any float, half of a surrogate pair, and more nesting than settings have are no
JSON here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file
from embedge.runtime.errors import BundleError, ManifestError

__all__ = ["MOST_BYTES", "Table", "parse_json", "read_json_object"]

MOST_BYTES = (1 << 63) - 1  # of a file
_MOST_DIGITS = 300  # floats end at 10**308
_MOST_LEVELS = 64
_MOST = (1 << 31) - 1  # of a whole number, where a key says nothing else


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


class Table:
    """A JSON object and where it stands, e.g. ``manifest.json: model``.

    Args:
        values: the object's members.
        path: dotted path of the object, empty for the document itself.
        file: name of the document, for messages.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "", file: str = "manifest.json"):
        self.values = values
        self.path = path
        self.file = file

    def fail(self, key: str | None, message: str) -> NoReturn:
        """Raises a :class:`ManifestError` about a key, or about the object itself."""
        where = ".".join(part for part in (self.path, key) if part)
        raise ManifestError(": ".join(part for part in (self.file, where, message) if part))

    def string(self, key: str) -> str:
        """A string; the key must be there."""
        value: str = self._required(key, str, "a string")
        return value

    def optional_string(self, key: str) -> str | None:
        """A string, or ``None`` for null or no such key."""
        return None if self.values.get(key) is None else self.string(key)

    def flag(self, key: str) -> bool:
        """True or false; the key must be there."""
        value: bool = self._required(key, bool, "true or false")
        return value

    def integer(self, key: str, *, minimum: int, maximum: int = _MOST) -> int:
        """A whole number from ``minimum`` to ``maximum``; the key must be there."""
        return self._checked_integer(key, self._present(key), minimum, maximum)

    def optional_integer(self, key: str, *, minimum: int, maximum: int = _MOST) -> int | None:
        """A whole number from ``minimum`` to ``maximum``, or ``None`` for null or no such key."""
        if self.values.get(key) is None:
            return None
        return self.integer(key, minimum=minimum, maximum=maximum)

    def number(self, key: str) -> int | float:
        """A finite number; the key must be there."""
        value = self._present(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
            self.fail(key, f"expected a number, found {_shown(value)}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of some strings; the key must be there."""
        value = self.string(key)
        if value not in choices:
            self.fail(key, f"expected one of {', '.join(choices)}, found {_shown(value)}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; the key must be there."""
        items = self._required(key, list, "a list of strings")
        for index, item in enumerate(items):
            if not isinstance(item, str):
                self.fail(f"{key}[{index}]", f"expected a string, found {_shown(item)}")
        return tuple(items)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers; the key must be there."""
        items = self._required(key, list, "a list of numbers")
        named = Table({str(i): item for i, item in enumerate(items)}, self._joined(key), self.file)
        return tuple(float(named.number(name)) for name in named.values)

    def integers(self, key: str, *, minimum: int) -> tuple[int, ...]:
        """A list of whole numbers of at least ``minimum``; the key must be there."""
        self._required(key, list, "a list of whole numbers")
        return self.optional_integers(key, minimum=minimum) or ()

    def optional_integers(self, key: str, *, minimum: int) -> tuple[int, ...] | None:
        """A list of whole numbers, or ``None`` for null or no such key."""
        if self.values.get(key) is None:
            return None
        items = self._required(key, list, "a list of whole numbers")
        return tuple(
            self._checked_integer(f"{key}[{index}]", item, minimum)
            for index, item in enumerate(items)
        )

    def table(self, key: str) -> Table:
        """An object; the key must be there."""
        values = self._required(key, dict, "an object")
        return Table(values, self._joined(key), self.file)

    def optional_table(self, key: str) -> Table | None:
        """An object, or ``None`` for null or no such key."""
        return None if self.values.get(key) is None else self.table(key)

    def tables(self) -> Iterator[tuple[str, Table]]:
        """The members, each of which must be an object."""
        for key in self.values:
            yield key, self.table(key)

    def string_map(self, key: str, *, required: bool = True) -> dict[str, str]:
        """An object of strings; empty for null or no such key unless required."""
        table = self.table(key) if required else self.optional_table(key)
        return {} if table is None else {name: table.string(name) for name in table.values}

    def free(self, key: str) -> dict[str, Any]:
        """An object whose members are not looked at; empty for null or no such key."""
        table = self.optional_table(key)
        return {} if table is None else dict(table.values)

    def _joined(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _present(self, key: str) -> Any:
        if key not in self.values:
            self.fail(key, "missing")
        return self.values[key]

    def _required(self, key: str, kind: type[Any], expected: str) -> Any:
        value = self._present(key)
        if not isinstance(value, kind):
            self.fail(key, f"expected {expected}, found {_shown(value)}")
        return value

    def _checked_integer(self, key: str, value: Any, minimum: int, maximum: int = _MOST) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(key, f"expected a whole number ≥ {minimum}, found {_shown(value)}")
        if value > maximum:
            self.fail(key, f"expected a whole number ≤ {maximum}, found {_shown(value)}")
        return value


def _shown(value: Any) -> str:
    """A value as JSON, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
