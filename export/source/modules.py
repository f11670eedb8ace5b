"""modules.json: the pipeline of a sentence-transformers model, and where the transformer lies in it."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from embedge.export.errors import CheckpointError
from embedge.export.source.json_files import read_json

__all__ = ["MODULES", "inside_folder", "pipeline", "transformer_folder"]

MODULES = "modules.json"
_OURS = "sentence_transformers."
# In the one supported order; Dropout, which does nothing once trained, may stand anywhere.
_ORDER = {"Transformer": 0, "Pooling": 1, "Dense": 2, "Normalize": 3}
_KINDS = (*_ORDER, "Dropout")


def transformer_folder(path: Path) -> Path:
    """Return the folder below ``path`` that holds the transformer: that of the first module.

    Raises:
        CheckpointError: if modules.json is damaged, or the first module is no transformer.
    """
    modules = _modules(path)
    if not modules:
        return path
    name, folder = modules[0]
    if name.startswith(_OURS) and name.rpartition(".")[2] not in _KINDS:
        raise CheckpointError(
            f"{path / MODULES}: the first module is {name}, expected sentence_transformers' Transformer; "
            "models of other kinds cannot be exported yet"
        )
    return folder


def pipeline(path: Path) -> list[tuple[str, Path]]:
    """Return kind and folder of all modules, none without modules.json.

    Raises:
        CheckpointError: if a module is not supported, or stands where it is not.
    """
    modules = _modules(path)
    kinds = [name.rpartition(".")[2] for name, _ in modules]
    for (name, _), kind in zip(modules, kinds, strict=True):
        if not name.startswith(_OURS) or kind not in _KINDS:
            raise CheckpointError(
                f"{path / MODULES}: the module {name} is not supported; supported are "
                f"sentence_transformers' {', '.join(_KINDS)}"
            )
    ranks = [_ORDER[kind] for kind in kinds if kind in _ORDER]
    once = [ranks.count(0), ranks.count(1)] == [1, 1]
    if modules and (not once or ranks != sorted(ranks)):
        raise CheckpointError(
            f"{path / MODULES}: the modules {' → '.join(kinds)} are not supported in this order; expected "
            "Transformer → Pooling → Dense … → Normalize, the last two where wanted"
        )
    return [(kind, folder) for kind, (_, folder) in zip(kinds, modules, strict=True)]


def inside_folder(relative: str, origin: Path) -> PurePosixPath:
    """Return ``relative`` unless it leaves the folder of the file ``origin`` that names it."""
    inside = PurePosixPath(relative)
    if inside.is_absolute() or ".." in inside.parts or re.search(r"[\\:\x00-\x1f]", relative):
        raise CheckpointError(
            f"{origin}: the path {relative!r} leaves the model folder; this is refused"
        )
    return inside


def _modules(path: Path) -> list[tuple[str, Path]]:
    """Class and folder of each module in modules.json, none without that file."""
    file = path / MODULES
    if not os.path.lexists(file):
        return []
    modules = read_json(file)
    if (
        not isinstance(modules, list)
        or not modules
        or not all(isinstance(m, dict) for m in modules)
    ):
        raise CheckpointError(
            f"{file}: expected a list of modules, each an object with a path and a type"
        )
    return [
        (str(m.get("type")), path / inside_folder(str(m.get("path") or ""), file)) for m in modules
    ]
