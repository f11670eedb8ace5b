"""The model card (README.md): a title, and what its front matter declares in simple YAML."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from embedge.export.errors import CheckpointError
from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file, system_reason

__all__ = ["ModelCard", "read_card"]

_TITLE = re.compile(r"#\s+(?:[\w.-]+/)?((?=[\w.-]*[\d-])[\w.-]+)\s*")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card says.

    Attributes:
        title: the first heading, where it is one word with a digit or a hyphen ("# all-MiniLM-L6-v2");
            without the organization in front.
        license: the declared licence, several joined by commas. ``license: other`` gives the card's
            ``license_name`` where there is one.
        tags: the declared tags and the pipeline's, in lower case.
    """

    title: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()


def read_card(folder: Path) -> ModelCard:
    """Read the card of the model in ``folder``; one that is missing says nothing.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    file = folder / "README.md"
    if not os.path.lexists(file):
        return ModelCard()
    try:
        text = read_regular_file(file, JSON_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {system_reason(error)}; it names the model and its "
            "licence: fetch it again, or remove it"
        ) from error
    front_matter, body = _split(text.lstrip("\ufeff").splitlines())
    licences = _values(front_matter, "license")
    if licences == ["other"]:
        licences = _values(front_matter, "license_name") or licences
    tags = _values(front_matter, "tags") + _values(front_matter, "pipeline_tag")
    heading = _TITLE.fullmatch(next((line for line in body if line.startswith("# ")), ""))
    return ModelCard(
        title=heading[1] if heading else None,
        license=", ".join(licences) or None,
        tags=tuple(tag.lower() for tag in tags),
    )


def _split(lines: list[str]) -> tuple[list[str], list[str]]:
    """The lines between a leading pair of ``---``, and those after it."""
    if lines and lines[0].strip() == "---":
        for end, line in enumerate(lines[1:], 1):
            if line.strip() == "---":
                return lines[1:end], lines[end + 1 :]
    return [], lines


def _values(lines: list[str], key: str) -> list[str]:
    """Return a top-level ``key``'s values in simple YAML: ``a``, ``[a, b]`` or ``- a`` lines."""
    for i, line in enumerate(lines):
        if not line.startswith(f"{key}:"):
            continue
        value = line.partition(":")[2].partition(" #")[0].strip()
        if value:
            return [_unquoted(part) for part in value.strip("[]").split(",") if _unquoted(part)]
        items = []
        for item in lines[i + 1 :]:
            if not item.lstrip().startswith("- "):
                break
            items.append(_unquoted(item.lstrip()[2:]))
        return items
    return []


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'")
