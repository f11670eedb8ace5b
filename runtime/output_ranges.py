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
from embedge.runtime.errors import EmbedgeError, EmbedgeValueError, warn

__all__ = ["calibrate_ranges", "cheapest_precision"]

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
) -> None:
    """Take the ranges of 8-bit output formats from the vectors of some texts, and keep them in the manifest.

    An export does so with its calibration texts. Codes of before, made by other ranges, are of another kind then:
    their fingerprint tells.

    Args:
        bundle: the bundle's folder.
        texts: such as you embed; some hundreds.
        tasks: those whose ranges to take; ``None``: all that have a graph at the precision.
        precision: whose graphs to run; ``None``: the smallest that a CPU runs.
        threads: as of :class:`Embedder`.
        max_seq_length: as of :class:`Embedder`.

    Raises:
        EmbedgeValueError: for fewer than two texts, or a task or precision that the bundle does not have.
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
    manifest = Bundle(bundle, verify="none").manifest
    precision = precision or cheapest_precision(Bundle(bundle, verify="none"))
    with Embedder(
        bundle, precision=precision, device="cpu", threads=threads, max_seq_length=max_seq_length
    ) as model:
        found = {
            task: _ranges_of_task(model, manifest, task, texts)
            for task in (model.tasks if tasks is None else tasks)
        }
    _write(Path(bundle), manifest, found)


def cheapest_precision(bundle: Bundle) -> str:
    """The precision with the smallest graphs of those that have all tasks and run on a CPU.

    Raises:
        EmbedgeValueError: if there is none.
    """
    manifest = bundle.manifest
    sizes = {
        name: max(bundle.graph_bytes(name, task) for task in settings.graphs)
        for name, settings in manifest.precisions.items()
        if "cpu" in settings.devices and not settings.unpack
    }
    most = max((len(manifest.precisions[name].graphs) for name in sizes), default=0)
    full = [name for name in sizes if len(manifest.precisions[name].graphs) == most]
    if not full:
        raise EmbedgeValueError(
            f"{bundle.root}: no precision runs on a CPU; it has {', '.join(manifest.precisions)}: pass ranges to "
            "encode instead",
            arguments=["precision"],
        )
    return min(full, key=sizes.__getitem__)


def _ranges_of_task(
    model: Embedder, manifest: Manifest, task: str, texts: Sequence[str]
) -> dict[str, OutputRanges]:
    """A task's members of the manifest."""
    prompts = list(dict.fromkeys(["", *model.get_prompts(task).values()]))
    if not manifest.model.include_prompt:
        prompts = [""]  # their tokens are not pooled
    prompted = [
        prompts[index % len(prompts)] + text for index, text in enumerate(texts) if text.strip()
    ]
    late = manifest.model.late_interaction is not None
    options: dict[str, Any] = {"task": task, "prompt": "", "on_truncate": "ignore"}

    def of_tokens() -> Iterator[NDArray[np.float32]]:
        for chunk in _chunks(prompted):
            yield from model.encode_document(chunk, multi_vector=True, **options)
            if late:
                yield from model.encode_query(chunk, multi_vector=True, **options)

    def of_texts() -> Iterator[NDArray[np.float32]]:
        for chunk in _chunks(prompted):
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
