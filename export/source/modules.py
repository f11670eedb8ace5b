"""modules.json: the pipeline of a sentence-transformers model, and where the transformer lies in it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from embedge.export.errors import CheckpointError
from embedge.export.source.json_files import read_json

__all__ = ["MODULES", "inside_folder", "module_names", "pipeline", "transformer_folder"]

MODULES = "modules.json"
_OURS = "sentence_transformers."
# In the one supported order; Dropout, which does nothing once trained, may stand anywhere.
_ORDER = {"Transformer": 0, "Pooling": 1, "Dense": 2, "Normalize": 3, "FlexibleQuantizer": 3}
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")
# The same of late interaction: no pooling, and a mask of tokens before or behind the normalization.
_LATE_ORDER = {"Transformer": 0, "Dense": 1, "Normalize": 2, "MultiVectorMask": 2}
_LATE_KINDS = (*_LATE_ORDER, "Dropout")
_PYLATE_DENSE = "pylate.models.Dense.Dense"
# Classes of published code, never run, by model_type: what they are here, and what a call may give them.
_PUBLISHED = {
    ("jina_embeddings_v5", "custom_st.Transformer"): ("JinaV5", {"task", "truncate_dim"}),
    ("xlm-roberta", "custom_st.Transformer"): ("Transformer", {"task"}),
    ("bidirectional_pplx_qwen3", "st_quantize.FlexibleQuantizer"): (
        "FlexibleQuantizer",
        {"quantization"},
    ),
}


class _Module(NamedTuple):
    """An entry of modules.json: its class, its folder, and what a call may give it."""

    name: str
    folder: Path
    arguments: Any


def transformer_folder(path: Path) -> Path:
    """Return the folder below ``path`` that holds the transformer: that of the first module.

    Raises:
        CheckpointError: if modules.json is damaged, or the first module is no transformer.
    """
    modules = _modules(path)
    if not modules:
        return path
    name, folder, _ = modules[0]
    if name.startswith(_OURS) and name.rpartition(".")[2] not in _KINDS:
        raise CheckpointError(
            f"{path / MODULES}: the first module is {name}, expected sentence_transformers' Transformer; "
            "models of other kinds cannot be exported yet"
        )
    return folder


def module_names(path: Path) -> list[str]:
    """Return the full names of all modules, none without modules.json."""
    return [module.name for module in _modules(path)]


def pipeline(path: Path, model_type: str = "", *, late: bool = False) -> list[tuple[str, Path]]:
    """Return kind and folder of all modules, none without modules.json.

    Classes of a model's own code are known by name and model type: "JinaV5" is a pipeline by itself (the last
    token, normalized), "FlexibleQuantizer" ends one in place of Normalize.

    Args:
        path: the model folder.
        model_type: of config.json.
        late: whether the model is one of late interaction.

    Raises:
        CheckpointError: if a module is not supported, or stands where it is not.
    """
    modules, file = _modules(path), path / MODULES
    if late:
        return _late_pipeline(file, modules)
    kinds = [_kind(file, module, model_type) for module in modules]
    ranks = [_ORDER[kind] for kind in kinds if kind in _ORDER]
    once = [ranks.count(0), ranks.count(1)] == [1, 1]
    ends = "FlexibleQuantizer" not in kinds or ranks.count(3) == 1
    if modules and kinds != ["JinaV5"] and not (once and ends and ranks == sorted(ranks)):
        raise CheckpointError(
            f"{file}: the modules {' → '.join(kinds)} are not supported in this order; expected "
            "Transformer → Pooling → Dense … → Normalize, the last two where wanted"
        )
    return [(kind, module.folder) for kind, module in zip(kinds, modules, strict=True)]


def _late_pipeline(file: Path, modules: Sequence[_Module]) -> list[tuple[str, Path]]:
    """Kind and folder of the modules of a late-interaction model."""
    kinds = [module.name.rpartition(".")[2] for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        ours = module.name.startswith(_OURS) or module.name == _PYLATE_DENSE
        if not ours or kind not in _LATE_KINDS:
            raise CheckpointError(
                f"{file}: the module {module.name} is not supported; supported are sentence_transformers' "
                f"{', '.join(_LATE_KINDS)} of a late-interaction model"
            )
    ranks = [_LATE_ORDER[kind] for kind in kinds if kind in _LATE_ORDER]
    once = ranks.count(0) == 1 and all(
        kinds.count(k) <= 1 for k, r in _LATE_ORDER.items() if r == 2
    )
    if modules and not (once and ranks == sorted(ranks)):
        raise CheckpointError(
            f"{file}: the modules {' → '.join(kinds)} are not supported in this order; expected "
            "Transformer → Dense … → MultiVectorMask → Normalize, each of these where wanted"
        )
    return [(kind, module.folder) for kind, module in zip(kinds, modules, strict=True)]


def _kind(file: Path, module: _Module, model_type: str) -> str:
    """What a module is."""
    kind = module.name.rpartition(".")[2]
    if module.name.startswith(_OURS) and kind in _KINDS:
        return kind
    known, arguments = _PUBLISHED.get((model_type, module.name), ("", set[str]()))
    if not known:
        raise CheckpointError(
            f"{file}: the module {module.name} is not supported; supported are "
            f"sentence_transformers' {', '.join(_KINDS)}"
        )
    given = module.arguments
    if not isinstance(given, list) or not arguments.issuperset(map(str, given)):
        raise CheckpointError(
            f"{file}: calls may give {given!r} to {module.name}, expected "
            f"{', '.join(sorted(arguments))}; its code is another than the published one, and is never run"
        )
    return known


def inside_folder(relative: str, origin: Path) -> PurePosixPath:
    """Return ``relative`` unless it leaves the folder of the file ``origin`` that names it."""
    inside = PurePosixPath(relative)
    if inside.is_absolute() or ".." in inside.parts or re.search(r"[\\:\x00-\x1f]", relative):
        raise CheckpointError(
            f"{origin}: the path {relative!r} leaves the model folder; this is refused"
        )
    return inside


def _modules(path: Path) -> list[_Module]:
    """The modules in modules.json, none without that file."""
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
        _Module(
            str(m.get("type")),
            path / inside_folder(str(m.get("path") or ""), file),
            m.get("kwargs") or [],
        )
        for m in modules
    ]
