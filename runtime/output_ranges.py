"""The ranges of a task's vectors, taken from some texts and kept in the bundle's manifest.

Rules:
    * A task's ranges are the same at all precisions, so that queries and documents of two find each other.
    * Those of the texts are widened by half on each side. A hundred texts show two thirds of what a thousand do, and a
      step that is twice as wide costs a cosine of 0.00004; clipping what lies outside costs more.
    * Texts have every prompt of the task, and none, in turns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.contract import FORMAT_VERSION, MANIFEST
from embedge.runtime.bundle.files import system_reason
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.json_object import json_text, read_json_object
from embedge.runtime.bundle.manifest import Manifest, OutputRanges
from embedge.runtime.bundle.writing import replace_file
from embedge.runtime.embedder import Embedder
from embedge.runtime.encode.prompted import prompted
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, warn

__all__ = ["calibrate_ranges", "cheapest_precision", "without_ranges"]

_FEW_TEXTS = 100
_CHUNK_TEXTS = 64  # whose multi-vectors are held at once
_MARGIN = 0.5  # of a range's width, on each side
_DIGITS = 4


def calibrate_ranges(
    bundle: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    precision: str | None = None,
    threads: int | None = None,
    max_seq_length: int | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Take the ranges of 8-bit output formats from the vectors of some texts, and keep them in the manifest.

    An export does so with its calibration texts. Codes of before, made by other ranges, are of another kind then:
    their fingerprint tells.

    Args:
        bundle: the bundle's folder.
        texts: such as you embed; some hundreds.
        tasks: those whose ranges to take, again where they have some; ``None``: all that have none.
        precision: whose graphs to run; ``None``: for each task the smallest that a CPU runs.
        threads: as of :class:`Embedder`.
        max_seq_length: as of :class:`Embedder`.
        overwrite: without ``tasks``, take those of all again.

    Returns:
        the tasks whose ranges were taken, and the precision of each.

    Raises:
        EmbedgeValueError: for fewer than two texts, a task or precision that the bundle does not have, or if every
            task has ranges already.
        EmbedgeError: if the bundle cannot be run, or its manifest not be written.
    """
    if isinstance(texts, str) or len(texts) < 2:
        raise EmbedgeValueError(
            "texts: expected at least two, better some hundreds such as you embed",
            arguments=["texts"],
        )
    if len(texts) < _FEW_TEXTS:
        warn(
            f"ranges of {len(texts)} texts; some hundreds such as you embed clip fewer values of others"
        )
    opened = Bundle(bundle, verify="none")
    manifest = opened.manifest
    chosen = {
        task: precision or cheapest_precision(opened, task)
        for task in _wanted(manifest, tasks, overwrite=overwrite)
    }
    found = {}
    for name in dict.fromkeys(chosen.values()):
        with Embedder(
            bundle, precision=name, device="cpu", threads=threads, max_seq_length=max_seq_length
        ) as model:
            for task in (task for task, its in chosen.items() if its == name):
                found[task] = _ranges_of_task(model, manifest, task, texts)
    _write(Path(bundle), manifest, found)
    return chosen


def without_ranges(manifest: Manifest) -> list[str]:
    """The tasks that have no ranges."""
    return [
        name
        for name, task in manifest.tasks.items()
        if task.output_ranges is None and task.token_ranges is None
    ]


def _wanted(manifest: Manifest, tasks: Sequence[str] | None, *, overwrite: bool) -> list[str]:
    """The tasks whose ranges a call takes."""
    if tasks is not None:
        unknown = [task for task in tasks if task not in manifest.tasks]
        if unknown or not tasks:
            raise EmbedgeValueError(
                f"tasks: expected some of {', '.join(manifest.tasks)}, found {', '.join(map(repr, unknown)) or 'none'}",
                arguments=["tasks"],
            )
        return list(dict.fromkeys(tasks))
    missing = list(manifest.tasks) if overwrite else without_ranges(manifest)
    if not missing:
        raise EmbedgeValueError(
            f"tasks: expected one without ranges, found none among {', '.join(manifest.tasks)}; codes that are stored "
            "are of these ranges: name the tasks to take again, or pass overwrite=True for all",
            arguments=["tasks", "overwrite=True"],
        )
    return missing


def cheapest_precision(bundle: Bundle, task: str) -> str:
    """The precision with the smallest graph of a task that runs on a CPU.

    Raises:
        EmbedgeValueError: if there is none.
    """
    sizes = {
        name: bundle.graph_bytes(name, task)
        for name, settings in bundle.manifest.precisions.items()
        if task in settings.graphs and "cpu" in settings.devices and not settings.unpack
    }
    if not sizes:
        raise EmbedgeValueError(
            f"{bundle.root}: no precision of the task {task!r} runs on a CPU; the bundle has "
            f"{', '.join(bundle.manifest.precisions)}: pass ranges to encode instead",
            arguments=["precision"],
        )
    return min(sizes, key=sizes.__getitem__)


def _ranges_of_task(
    model: Embedder, manifest: Manifest, task: str, texts: Sequence[str]
) -> dict[str, OutputRanges]:
    """A task's members of the manifest."""
    given = prompted(manifest, task, texts)
    late = manifest.model.late_interaction is not None
    options: dict[str, Any] = {"task": task, "prompt": "", "on_truncate": "ignore"}

    def of_tokens() -> Iterator[NDArray[np.float32]]:
        for chunk in _chunks(given):
            yield from model.encode_document(chunk, multi_vector=True, **options)
            if late:
                yield from model.encode_query(chunk, multi_vector=True, **options)

    def of_texts() -> Iterator[NDArray[np.float32]]:
        for chunk in _chunks(given):
            yield model.encode(chunk, truncate_dim=model_dim, **options)

    model_dim = manifest.model.dim
    members = {}
    if not late:
        members["output_ranges"] = _ranges(of_texts())
    if manifest.model.multi_vector_dim is not None:
        members["token_ranges"] = _ranges(of_tokens())
    return members


def _ranges(parts: Iterable[NDArray[np.float32]]) -> OutputRanges:
    """Those of vectors ``[n, dim]`` that come in parts."""
    count, lowest, highest, squares = 0, np.float32(np.inf), np.float32(-np.inf), np.float64(0)
    for vectors in parts:
        if not len(vectors):
            continue
        count += len(vectors)
        lowest = np.minimum(lowest, vectors.min(0))
        highest = np.maximum(highest, vectors.max(0))
        squares = squares + np.square(vectors, dtype=np.float64).sum(0)
    if count < 2:
        raise EmbedgeValueError("texts: expected at least two with tokens, found fewer")
    margin = (highest - lowest) * np.float32(_MARGIN)
    return OutputRanges(
        lowest=_rounded(lowest - margin),
        highest=_rounded(highest + margin),
        mean_square=_rounded(squares / count),
        vectors=count,
    )


def _rounded(values: Any) -> tuple[float, ...]:
    """To so many digits that a float more or less in the vectors' last bit hardly ever shows."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while chunk := list(islice(rest, _CHUNK_TEXTS)):
        yield chunk


def _write(folder: Path, manifest: Manifest, found: dict[str, dict[str, OutputRanges]]) -> None:
    """Adds ranges to the manifest that is there, whose other members stay."""
    file = folder / MANIFEST
    document = read_json_object(file)
    if Manifest.from_dict(document, str(file)) != manifest:
        raise EmbedgeError(f"{folder}: was changed while it ran; take the ranges again")
    for task, members in found.items():
        document["tasks"][task] |= {name: ranges.to_dict() for name, ranges in members.items()}
    document["format_version"] = max(
        document["format_version"], FORMAT_VERSION, key=lambda text: [*map(int, text.split("."))]
    )
    Manifest.from_dict(document, str(file))
    try:
        replace_file(file, json_text(document))
    except OSError as error:
        raise EmbedgeError(
            f"{folder}: the ranges could not be written: {system_reason(error)}; make the folder writable, or copy it"
        ) from error
