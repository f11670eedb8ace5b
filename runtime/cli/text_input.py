"""Texts, or paths of images, from a stream of lines, or of JSON objects.

Rules:
    * Lines end with a line feed; a carriage return before it, and a byte order mark at the start,
      are dropped. An empty line is an empty text: the n-th line gives the n-th vector.
    * The input is UTF-8; JSONL holds an object with a string under the field on every line.
      Anything else is an error with the number of the line, also NaN and Infinity, which Python
      reads but JSON does not have, and numbers that would become Infinity.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from embedge.runtime.errors import EmbedgeError

__all__ = ["Record", "chunked", "decoded", "read_records"]


@dataclass(frozen=True)
class Record:
    """A text or path, the number of its line (from 1), the other members of its JSON object."""

    text: str
    line: int
    others: dict[str, Any]


def read_records(
    lines: Iterable[bytes],
    field: str | None,
    *,
    keep: Collection[str] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Record]:
    """The records of an input.

    Args:
        lines: each with its line end.
        field: key of the text in JSONL; ``None``: the lines are the texts.
        keep: the other keys to give, each of which every object has; ``None``: all.
        start: the first line, from 0; those before it are not looked at.
        stop: the line after the last; ``None``: all.

    Raises:
        EmbedgeError: with the number of the first line that cannot be used.
    """
    for number, ended in islice(enumerate(lines, start=1), start, stop):
        line = decoded(ended.removesuffix(b"\n").removesuffix(b"\r"), number)
        if field is None:
            yield Record(line, number, {})
            continue
        record = _parsed(line, number, field)
        yield record if keep is None else _reduced(record, keep)


def decoded(raw: bytes, number: int) -> str:
    """The text of a line, without the byte order mark of the first.

    Raises:
        EmbedgeError: it is not UTF-8.
    """
    if number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise EmbedgeError(
            f"input line {number}: not UTF-8 ({error.reason} at byte {error.start}); convert "
            "the input first, e.g. `iconv -f LATIN1 -t UTF-8`"
        ) from error


def chunked(records: Iterable[Record], *, rows: int, characters: int) -> Iterator[list[Record]]:
    """Records in lists that end at a number of rows, or once they hold so many characters."""
    chunk: list[Record] = []
    held = 0
    for record in records:
        chunk.append(record)
        held += len(record.text)
        if len(chunk) >= rows or held >= characters:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _reduced(record: Record, keep: Collection[str]) -> Record:
    for name in keep:
        if name not in record.others:
            raise EmbedgeError(
                f"input line {record.line}: expected the key {name!r}, which --keep names, found none; keys there: "
                f"{', '.join(record.others) or 'none'}"
            )
    return Record(record.text, record.line, {name: record.others[name] for name in keep})


def _parsed(line: str, number: int, field: str) -> Record:
    try:
        members = json.loads(line, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise EmbedgeError(
            f"input line {number}: expected a JSON object, found {line[:40]!r} ({error})"
        ) from error
    if not isinstance(members, dict):
        raise EmbedgeError(
            f"input line {number}: expected a JSON object, found {type(members).__name__}"
        )
    if not isinstance(members.get(field), str):
        found = type(members[field]).__name__ if field in members else "no such key"
        raise EmbedgeError(
            f"input line {number}: expected a string under {field!r}, found {found}; keys there: "
            f"{', '.join(members) or 'none'} (--field names another)"
        )
    text = members.pop(field)
    return Record(text, number, members)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is larger than a float can be; write null or a string")
    return value
