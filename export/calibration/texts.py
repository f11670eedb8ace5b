"""The texts that calibration runs through a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from embedge.export.source.sentence_transformers import SentenceSettings
from embedge.runtime.errors import EmbedgeValueError


def calibration_texts(source: Path | str) -> list[str]:
    """The texts of a file, the package's for "default", none for "none"."""
    if isinstance(source, Path):
        return read_texts(source)
    return [] if source == "none" else packaged_texts()


def with_prompts(texts: Sequence[str], settings: SentenceSettings) -> list[str]:
    """Every prompt, and none, before its share of the texts: in causal models all tokens see it.

    Prompts are those of all tasks, whichever are asked for: all of a bundle share the constants.
    """
    sets = [settings.prompts, *settings.task_prompts.values()]
    starts = list(dict.fromkeys(["", *(text for prompts in sets for text in prompts.values())]))
    return [starts[number % len(starts)] + text for number, text in enumerate(texts)]


def packaged_texts() -> list[str]:
    """The neutral texts that ship with the package (``data/calibration.jsonl``)."""
    text = (
        resources.files("embedge.export.calibration")
        .joinpath("data/calibration.jsonl")
        .read_text("utf-8")
    )
    return [json.loads(line)["text"] for line in text.split("\n") if line]


def read_texts(path: Path) -> list[str]:
    """The user's texts: one per line, or one JSON object with ``text`` (or a string) per line.

    Raises:
        EmbedgeValueError: the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # JSON lines may hold U+2028 and kin
    except (OSError, UnicodeDecodeError) as error:
        raise EmbedgeValueError(
            f"calibration file {path}: expected a readable UTF-8 text file, found {error}; "
            "give one text per line, or JSON lines with a 'text' key"
        ) from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix in (".jsonl", ".ndjson"):
            texts.append(_json_text(path, number, line))
        else:
            texts.append(line)
    if not texts:
        raise EmbedgeValueError(
            f"calibration file {path}: expected at least one text, found none; "
            "give some dozens of texts of the kind you will embed"
        )
    return texts


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise EmbedgeValueError(
            f"calibration file {path}, line {number}: expected JSON, found {error}"
        ) from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise EmbedgeValueError(
            f"calibration file {path}, line {number}: expected a string or an object with a "
            f"string 'text', found {line[:60]!r}"
        )
    return text
