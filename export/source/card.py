"""What a model is called and how it is licensed, from its card (README.md) and config.json.

The name goes into the manifest, so it must not be a path of the exporting machine, and it should be
the same wherever the folder lies. Sources in order:

1. the hub id, or the hub id in the path of the hub's cache;
2. the card's first heading, when it is one word with a digit or a hyphen ("# all-MiniLM-L6-v2");
3. ``_name_or_path`` in config.json (last, because a fine-tuned model often keeps its parent's name
   there);
4. the folder's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file, system_reason

__all__ = [
    "base_name",
    "hub_name",
    "known_names",
    "read_license",
    "read_name",
    "read_tags",
    "recorded_name",
    "says_nothing",
]

_TITLE = re.compile(r"#\s+(?:[\w.-]+/)?((?=[\w.-]*[\d-])[\w.-]+)\s*")
# Folders of training and of temporary files, numbers, a commit.
_NO_NAME = re.compile(
    r"\.{0,2}|(?:(?:base|best|final|last|merged|my|new|output|trained)[-_.]?)*"
    r"(?:base|best|checkpoints?|ckpt|data|files?|final|folder|hf|last|latest|merged|models?|output|outputs"
    r"|pretrained|results?|snapshots?|source|te?mp|test|transformer|weights|work)(?:[-_.]?(?:step)?\d+)?"
    r"|0_transformer|(?:checkpoint|ckpt|epoch|run|step|v)?[-_.]?\d+|[0-9a-f]{40}|tmp[\w]{6,12}"
)
_CACHE = re.compile(r"models--(?:.+--)?([\w.-]+)")


def base_name(path: str) -> str:
    """Return the last part of a hub id or of a path of any system: ``"org/name"`` → ``"name"``."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def hub_name(folder: Path) -> str | None:
    """Return the model's name if ``folder`` is a snapshot in the hub's cache."""
    for part in reversed(folder.resolve().parts):
        if match := _CACHE.fullmatch(part):
            return match[1]
    return None


def read_name(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the short name of the model in ``folder`` by the rules at the top of this module."""
    return next(iter(_names(folder, config)))


def known_names(folder: Path, config: Mapping[str, Any]) -> frozenset[str]:
    """Return every name the model goes by, in lower case: what an adapter may call its base.

    The name in config.json, often that of a fine-tuned model's parent, counts where nothing else names it.
    """
    sure = [hub_name(folder), _title(folder)]
    names = sure if any(sure) else [_recorded(config)]
    found = (name.lower() for name in [*names, folder.resolve().name] if name)
    return frozenset(name for name in found if not says_nothing(name))


def says_nothing(name: str) -> bool:
    """Return whether a name is one that any model may lie under: ``"model"``, ``"checkpoint-500"``."""
    return _NO_NAME.fullmatch(name.lower()) is not None


def recorded_name(recorded: str) -> str | None:
    """Return the name in a recorded hub id or path of any system, ``None`` where it says nothing."""
    parts = re.split(r"[/\\]", recorded.strip().rstrip("/\\"))
    cached = next((match[1] for part in parts if (match := _CACHE.fullmatch(part))), None)
    name = cached or parts[-1]
    return None if says_nothing(name) else name


def _recorded(config: Mapping[str, Any]) -> str:
    return base_name(str(config.get("_name_or_path") or ""))


def _names(folder: Path, config: Mapping[str, Any]) -> list[str]:
    names = [hub_name(folder), _title(folder), _recorded(config), folder.resolve().name, "model"]
    return [name for name in names if name and name not in (".", "..")]


def _card(folder: Path) -> str:
    file = folder / "README.md"
    if not os.path.lexists(file):
        return ""
    try:
        return read_regular_file(file, JSON_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {system_reason(error)}; it names the model and its "
            "licence: fetch it again, or remove it"
        ) from error


def _front_matter(card: str) -> list[str]:
    """Return the lines between the card's leading pair of ``---``."""
    lines = card.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return []
    ends = [i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"]
    return lines[1 : ends[0]] if ends else []


def _title(folder: Path) -> str | None:
    card = _card(folder)
    front_matter = _front_matter(card)
    body = card.lstrip("\ufeff").splitlines()[len(front_matter) + 2 if front_matter else 0 :]
    for line in body:
        if line.startswith("# "):
            match = _TITLE.fullmatch(line)
            return match[1] if match else None
    return None


def read_license(folder: Path) -> str | None:
    """Return the licence that the model card declares, ``None`` if it declares none.

    ``license: other`` gives the card's ``license_name`` where there is one; several licences are
    joined by commas.
    """
    lines = _front_matter(_card(folder))
    licences = _values(lines, "license")
    if licences == ["other"]:
        licences = _values(lines, "license_name") or licences
    return ", ".join(licences) or None


def read_tags(folder: Path) -> tuple[str, ...]:
    """Return the tags that the model card declares, its pipeline's among them, in lower case."""
    lines = _front_matter(_card(folder))
    return tuple(tag.lower() for tag in _values(lines, "tags") + _values(lines, "pipeline_tag"))


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
