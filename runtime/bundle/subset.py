"""A smaller bundle of some of a bundle's precisions and tasks.

Rules:
    * Files are taken whole: what is left out are the other tasks' and precisions' own. What tasks share
      (``shared.bin``) keeps what only the others use.
    * Every file is compared with its SHA-256 as it is copied. Links, as the hub's cache has them, become
      files.
    * The new bundle appears under its name when it is whole, and takes no other's place.
    * Maps are kept where all of their tasks are.
    * Its card is written anew where something is left out, whose measurements are not its own. The manifest
      keeps the figures of what it has. What `embedge prepare` made is not taken along.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from embedge.runtime.bundle.contract import CARD, MANIFEST, MAPS, SHARED_CONSTANTS, VISION
from embedge.runtime.bundle.files import (
    JSON_BYTES,
    open_regular_file,
    read_regular_file,
    system_reason,
)
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import json_text, read_json_object
from embedge.runtime.bundle.lock import sole_holder
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.model_card import model_card, renewed_card
from embedge.runtime.bundle.writing import (
    NAME_INSIDE,
    check_new,
    new_folder,
    recover,
    sync_files,
)
from embedge.runtime.errors import BundleError, EmbedgeError, EmbedgeValueError, warn

__all__ = ["Part", "chosen_part", "copy_part", "subset_bundle"]

_BY_TASK = ("graphs", "layers", "fidelity", "unpack", "content_sha256", "task_tensors")
_CHUNK_BYTES = 1 << 20


def subset_bundle(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precisions: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    link: bool = False,
) -> Path:
    """Write a bundle of some of a bundle's precisions and tasks.

    Args:
        bundle: the folder of the whole one.
        out: the new one's, which must not exist or be empty.
        precisions: which to keep; ``None``: all that have one of the tasks.
        tasks: likewise; ``None``: all that one of the precisions has.
        link: make hard links instead of copies, which takes no room: the two bundles then share their
            files.

    Returns:
        ``out`` as a path.

    Raises:
        EmbedgeValueError: for a precision or task that the bundle does not have, or an ``out`` that is
            taken.
        BundleError: if the bundle is damaged.
        EmbedgeError: if nothing can be written there.
    """
    source = Bundle(bundle)
    return copy_part(source, out, chosen_part(source, precisions, tasks), link=link)


class Part(NamedTuple):
    """What of a bundle is chosen: its manifest, as a document and as it is read."""

    document: Mapping[str, Any]
    manifest: Manifest


def chosen_part(
    source: Bundle, precisions: Sequence[str] | None, tasks: Sequence[str] | None
) -> Part:
    """A bundle's part, of which graphs and lists have to be there, but not weights.

    Args:
        source: the whole bundle.
        precisions: as for :func:`subset_bundle`.
        tasks: likewise.

    Raises:
        EmbedgeValueError: for a precision or task that the bundle does not have.
        BundleError: if the bundle is damaged.
    """
    chosen = _chosen(source.manifest, _names("precisions", precisions), _names("tasks", tasks))
    document = _document(source, chosen)
    return Part(document, Manifest.from_dict(document, str(source.root / MANIFEST)))


def copy_part(
    source: Bundle, out: str | os.PathLike[str], part: Part, *, link: bool = False
) -> Path:
    """Write a part of a bundle as a bundle; raises as :func:`subset_bundle`."""
    target, (document, manifest) = Path(out), part
    try:
        real = Path(os.path.realpath(target))
        _check_free(source, target, real)
        real.parent.mkdir(parents=True, exist_ok=True)
        with sole_holder(real.parent / f".{real.name}.lock", lambda holder: _busy(target, holder)):
            recover(real)
            _check_free(source, target, real)
            card = source.unlisted(CARD) if manifest == source.manifest else None
            with new_folder(real, replace=False) as work:
                _fill(work, source, manifest, document, link=link, card=card)
    except OSError as error:
        raise _refused(target, error, link=link) from error
    if card is None and _has_own_text(source):
        warn(
            f"{target / CARD}: a new card; that of {source.root}, which somebody changed or an earlier "
            "embedge wrote, is not in it: add what still holds"
        )
    return target if target.is_dir() else real


def _names(argument: str, value: Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise EmbedgeValueError(f"{argument}: expected at least one name, found {value!r}")
    return names


def _chosen(
    manifest: Manifest, precisions: list[str] | None, tasks: list[str] | None
) -> dict[str, list[str]]:
    """Tasks by precision, in the manifest's order."""
    kinds: tuple[tuple[str, list[str] | None, Iterable[str]], ...] = (
        ("precision", precisions, manifest.precisions),
        ("task", tasks, manifest.tasks),
    )
    for kind, wanted, known in kinds:
        unknown = [name for name in wanted or () if name not in known]
        if unknown:
            raise EmbedgeValueError(
                f"the bundle has no {kind} {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
            )
    chosen = {
        precision: [task for task in settings.graphs if tasks is None or task in tasks]
        for precision, settings in manifest.precisions.items()
        if precisions is None or precision in precisions
    }
    for precision in precisions or ():
        if not chosen[precision]:
            raise EmbedgeValueError(
                f"precision {precision!r} has none of the tasks {', '.join(tasks or ())}; it has "
                f"{', '.join(manifest.precisions[precision].graphs)}"
            )
    found = {task for names in chosen.values() for task in names}
    for task in tasks or ():
        if task not in found:
            having = [p for p, settings in manifest.precisions.items() if task in settings.graphs]
            raise EmbedgeValueError(
                f"task {task!r} has no graph at {', '.join(chosen)}; it has one at "
                f"{', '.join(having) or 'no precision'}"
            )
    return {precision: names for precision, names in chosen.items() if names}


def _document(source: Bundle, chosen: Mapping[str, list[str]]) -> dict[str, Any]:
    """The manifest of the new bundle; keys that this embedge does not know stay."""
    file = source.root / MANIFEST
    document = read_json_object(file)
    if Manifest.from_dict(document, str(file)) != source.manifest:
        raise BundleError(f"{source.root}: was replaced while it was opened; open it again")
    kept = {task for names in chosen.values() for task in names}
    document["tasks"] = {name: t for name, t in document["tasks"].items() if name in kept}
    document["precisions"] = {
        precision: _precision(document["precisions"][precision], names)
        for precision, names in chosen.items()
    }
    files = {source.manifest.tokenizer.file}
    for precision, names in chosen.items():
        settings = source.manifest.precisions[precision]
        maps = [MAPS] if settings.maps and set(settings.maps.tasks) <= set(names) else []
        for name in (*names, *([VISION] if settings.vision else []), *maps):
            files.update(source.graph_files(precision, name))
        if settings.task_tensors:
            files.add(f"{precision}/{SHARED_CONSTANTS}")
        for by_task in (settings.layers, settings.task_tensors):
            files.update(path for task, path in by_task.items() if task in names)
    document["files"] = {name: f for name, f in document["files"].items() if name in files}
    return document


def _precision(values: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """A precision's part of the manifest with some of its tasks."""
    result = dict(values)
    for key in _BY_TASK:
        if isinstance(result.get(key), dict):
            kept = {*tasks, *([VISION] if key == "content_sha256" else [])}
            result[key] = {task: v for task, v in result[key].items() if task in kept}
    maps = result.get("maps")
    if isinstance(maps, dict) and not set(maps["tasks"]) <= set(tasks):
        del result["maps"]
    options = result.get("options")
    if isinstance(options, dict) and isinstance(options.get("by_task"), dict):
        by_task = {task: v for task, v in options["by_task"].items() if task in tasks}
        result["options"] = {**options, "by_task": by_task}
    return result


def _check_free(source: Bundle, out: Path, real: Path) -> None:
    if real.is_relative_to(source.root):
        raise EmbedgeValueError(f"{out}: lies in the bundle; name a folder outside {source.root}")
    check_new(out, real)


def _fill(
    work: Path,
    source: Bundle,
    manifest: Manifest,
    document: Mapping[str, Any],
    *,
    link: bool,
    card: bytes | None,
) -> None:
    """Writes the files, and ``card``, or a new one."""
    for name, entry in manifest.files.items():
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.reading([name]):
            file = source.file(name).resolve()
            if link:
                os.link(file, target)
            elif _copy(file, target) != entry.sha256:
                raise BundleError(
                    f"{source.root / name}: expected SHA-256 {entry.sha256}, found another; copy or export "
                    "the bundle again"
                )
    (work / MANIFEST).write_text(json_text(document), "utf-8", newline="\n")
    (work / CARD).write_bytes(model_card(manifest).encode() if card is None else card)
    sync_files(work, (*([] if link else manifest.files), MANIFEST, CARD))


def _copy(source: Path, target: Path) -> str:
    """Copies a file; the SHA-256 of what was copied."""
    state = hashlib.sha256()
    with open_regular_file(source) as read, target.open("xb") as written:
        while chunk := read.read(_CHUNK_BYTES):
            state.update(chunk)
            written.write(chunk)
    return state.hexdigest()


def _has_own_text(bundle: Bundle) -> bool:
    """Whether somebody has written in a bundle's card."""
    try:
        card = read_regular_file(bundle.root / CARD, JSON_BYTES).decode("utf-8", "replace")
    except OSError:
        return False
    return renewed_card(card, bundle.manifest) is None


def _busy(out: Path, holder: str) -> EmbedgeError:
    return EmbedgeError(
        f"{out}: expected nobody else to write it at the same time, found {holder} writing it; wait until "
        "that is done, or name another folder"
    )


def _refused(out: Path, error: OSError, *, link: bool) -> EmbedgeError:
    reason, advice = system_reason(error), "name another folder"
    if error.errno == errno.EXDEV:
        advice = (
            "links need both on the same disk: leave link out, or name a folder beside the bundle"
        )
    elif error.errno == errno.EBUSY:  # something is mounted there
        advice = NAME_INSIDE
    elif link and error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
        advice = "leave link out"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, or name a folder on another disk"
    return EmbedgeError(f"{out}: cannot be written: {reason}; nothing was left there: {advice}")
