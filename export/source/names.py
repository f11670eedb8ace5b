"""What a model is called: a name, never a path, and the same wherever its folder lies.

Sources in order:

1. the hub id, or the hub id in the path of the hub's cache;
2. the title of its card;
3. ``_name_or_path`` in config.json (last, because a fine-tuned model often keeps its parent's name
   there);
4. the folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["base_name", "cached_hub_id", "known_names", "model_name", "recorded_name"]

# Folders of training and of temporary files, numbers, a commit.
_NO_NAME = re.compile(
    r"\.{0,2}|(?:(?:base|best|final|last|merged|my|new|output|trained)[-_.]?)*"
    r"(?:base|best|checkpoints?|ckpt|data|files?|final|folder|hf|last|latest|merged|models?|output|outputs"
    r"|pretrained|results?|snapshots?|source|te?mp|test|transformer|weights|work)(?:[-_.]?(?:step)?\d+)?"
    r"|0_transformer|(?:checkpoint|ckpt|epoch|run|step|v)?[-_.]?\d+|[0-9a-f]{40}|tmp[\w]{6,12}"
)
_CACHE = re.compile(r"models--(?:.+--)?([\w.-]+)")
_CACHE_ID = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def base_name(path: str) -> str:
    """Return the last part of a hub id or of a path of any system: ``"org/name"`` → ``"name"``."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def model_name(folder: Path, title: str | None, config: Mapping[str, Any]) -> str:
    """Return the short name of a model by the rules at the top of this module.

    Args:
        folder: the model's folder.
        title: of its card, ``None`` where that names nothing.
        config: its config.json.
    """
    resolved = folder.resolve()
    names = (_cached(resolved.parts[::-1]), title, _recorded(config), resolved.name)
    return next((name for name in names if name and name not in (".", "..")), "model")


def cached_hub_id(folder: Path) -> str | None:
    """Return the hub id of a model in the hub's cache, ``None`` where the folder lies elsewhere."""
    for part in reversed(folder.resolve().parts):
        match = _CACHE_ID.fullmatch(part)
        if match:
            return f"{match[1]}/{match[2]}"
    return None


def known_names(
    folder: Path, title: str | None, config: Mapping[str, Any], name: str
) -> frozenset[str]:
    """Return every name the model goes by, in lower case: what an adapter may call its base.

    The name in config.json, often that of a fine-tuned model's parent, counts where nothing else names it.
    """
    resolved = folder.resolve()
    sure = [_cached(resolved.parts[::-1]), title]
    names = [*(sure if any(sure) else [_recorded(config)]), resolved.name, name]
    return frozenset(name.lower() for name in names if name and not _says_nothing(name))


def recorded_name(recorded: str) -> str | None:
    """Return the name in a recorded hub id or path of any system, ``None`` where it says nothing."""
    parts = re.split(r"[/\\]", recorded.strip().rstrip("/\\"))
    name = _cached(parts) or parts[-1]
    return None if _says_nothing(name) else name


def _cached(parts: Sequence[str]) -> str | None:
    """The name in the first part that is a model's folder in the hub's cache."""
    return next((match[1] for part in parts if (match := _CACHE.fullmatch(part))), None)


def _recorded(config: Mapping[str, Any]) -> str:
    return base_name(str(config.get("_name_or_path") or ""))


def _says_nothing(name: str) -> bool:
    """Whether any model may lie under such a name: ``"model"``, ``"checkpoint-500"``."""
    return _NO_NAME.fullmatch(name.lower()) is not None
