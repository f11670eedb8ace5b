"""Reading the JSON files of model and adapter folders, with errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError, ExportError
from embedge.runtime.bundle.files import TOKENIZER_BYTES, read_regular_file
from embedge.runtime.bundle.json_object import parse_json

__all__ = ["parse_object", "read_bytes", "read_json", "read_json_object", "read_optional"]


def read_bytes(path: Path, error: type[ExportError] = CheckpointError) -> bytes:
    """Return the content of the file at ``path``; tokenizer.json, the largest, sets the limit.

    Raises:
        ExportError: as ``error``, if the file cannot be read.
    """
    try:
        return read_regular_file(path, TOKENIZER_BYTES)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem


def read_json(path: Path, error: type[ExportError] = CheckpointError) -> Any:
    """Return the parsed content of the JSON file at ``path``.

    Raises:
        ExportError: as ``error``, if the file cannot be read or is not JSON in UTF-8.
    """
    return _parse(read_bytes(path, error), path, error)


def read_json_object(path: Path, error: type[ExportError] = CheckpointError) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``; other JSON is refused like broken JSON."""
    return parse_object(read_bytes(path, error), path, error)


def read_optional(path: Path, error: type[ExportError] = CheckpointError) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``, an empty one if nothing has that name.

    A link to nothing, or what is no file, is an error: what it should say would be lost without a word.
    """
    return read_json_object(path, error) if os.path.lexists(path) else {}


def parse_object(
    content: bytes, path: Path, error: type[ExportError] = CheckpointError
) -> dict[str, Any]:
    """Return the JSON object that ``content``, read from ``path``, holds."""
    value = _parse(content, path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _parse(content: bytes, path: Path, error: type[ExportError]) -> Any:
    try:
        return parse_json(content)
    except ValueError as problem:  # JSONDecodeError and UnicodeError
        raise error(f"{path}: is not JSON: {problem}; fetch or save the file again") from problem
