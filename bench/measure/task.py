"""One task: every system on the same texts, then all of them in turn on the clock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.measure.fidelity import batch_invariance, by_kind, fidelity
from embedge.bench.measure.labelled import (
    Columns,
    against,
    column_quality,
    encode_columns,
    format_qualities,
)
from embedge.bench.measure.latency import Times, alternate, one_by_one, ratio, spread
from embedge.bench.measure.pages import (
    DEPTHS,
    align_columns,
    align_stored,
    budget_figures,
    page_times,
    token_qualities,
)
from embedge.bench.measure.quality import Quality, truncated
from embedge.bench.measure.texts import EvalSet, Text
from embedge.bench.options import Profile, Shape
from embedge.bench.systems.reference import Reference
from embedge.bench.systems.source import Source
from embedge.bench.systems.system import EmbedgeSystem, PageSystem, System, TorchSystem
from embedge.bench.systems.tokens import TextTokens
from embedge.runtime.scoring.quantization import ranges_of

__all__ = [
    "TORCH_FP32",
    "TaskData",
    "TaskVectors",
    "add_mixed",
    "image_figures",
    "latency",
    "longest_role",
    "reference_vectors",
    "single_texts",
    "vectors_against",
]

TORCH_FP32 = "torch fp32"
Vectors = NDArray[np.float32]
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a task is measured on.

    Attributes:
        texts: for fidelity.
        evaluations: labelled sets, the main one first.
        dims: dimensions to cut at, the full one included.
        normalize: whether a cut vector is scaled back to length 1.
        budgets: most pixels of a page, the source's own first; empty where nothing takes images.
        multi_vectors: whether pages are searched by a vector a token too.
    """

    texts: Sequence[Text]
    evaluations: Sequence[EvalSet] = ()
    dims: Sequence[int]
    normalize: bool = True
    budgets: Sequence[int] = ()
    multi_vectors: bool = False

    @property
    def pages(self) -> EvalSet | None:
        """The main set of page images."""
        return next((one for one in self.evaluations if one.modality == "image"), None)


@dataclass(frozen=True, kw_only=True)
class TaskVectors:
    """What one system gives for a task's data.

    Attributes:
        texts: float32 ``[texts, dim]``.
        columns: the vectors of a set's two columns, by evaluation set.
        qualities: by evaluation set and dimension.
        tokens: of multi-vectors, by set of pages and depth.
    """

    texts: Vectors
    columns: dict[str, Columns] = field(default_factory=dict)
    qualities: dict[tuple[str, int], Quality] = field(default_factory=dict)
    tokens: dict[str, dict[int, Quality]] = field(default_factory=dict)


def task_vectors(system: System, data: TaskData) -> TaskVectors:
    """Return a system's vectors and qualities for a task's data."""
    texts = system.encode([text.text for text in data.texts])
    columns = {one.name: encode_columns(system, one) for one in data.evaluations}
    qualities = {
        (one.name, dim): column_quality(one, columns[one.name], dim, data.normalize)
        for one in data.evaluations
        for dim in data.dims
    }
    tokens = {
        one.name: token_qualities(system, one)
        for one in data.evaluations
        if one.modality == "image" and data.multi_vectors and isinstance(system, PageSystem)
    }
    return TaskVectors(texts=texts, columns=columns, qualities=qualities, tokens=tokens)


def reference_vectors(reference: Reference, data: TaskData) -> TaskVectors:
    """Return the yardstick's vectors and qualities for a task's data."""
    return task_vectors(TorchSystem("reference", reference), data)


def vectors_against(
    system: System, data: TaskData, reference: TaskVectors, profile: Profile
) -> tuple[Figures, TaskVectors]:
    """Return the fields of a row that come from vectors (fidelity, quality, invariance), and the vectors."""
    texts = [text.text for text in data.texts]
    own = profile.torch_quality or system.name != TORCH_FP32
    ours = task_vectors(system, data) if own else reference
    figures: Figures = {
        "fidelity": fidelity(ours.texts, reference.texts, data.dims),
        "fidelity_by_kind": by_kind(ours.texts, reference.texts, [t.kind for t in data.texts]),
        "quality": {},
    }
    for evaluation in data.evaluations:
        dims = {}
        for dim in data.dims:
            key = (evaluation.name, dim)
            dims[str(dim)] = against(evaluation, ours.qualities[key], reference.qualities[key])
        figures["quality"][evaluation.name] = {
            "metric": evaluation.metric,
            "modality": evaluation.modality,
            "items": len(ours.qualities[evaluation.name, data.dims[0]].items),
            "dims": dims,
        }
        if evaluation.modality == "image":
            figures["quality"][evaluation.name] |= _page_figures(evaluation, data, ours, reference)
        if isinstance(system, EmbedgeSystem):
            formats = _formats(system, evaluation, data, ours, reference)
            figures["quality"][evaluation.name]["formats"] = formats
            if evaluation.modality == "image":
                whole = ours.columns[evaluation.name]
                aligned = align_stored(evaluation, whole, ranges_of(whole.second))
                figures["quality"][evaluation.name]["alignment"]["formats"] = aligned
    if system.role != "torch" and profile.invariance:
        step = max(1, len(texts) // profile.invariance)
        figures["invariance"] = batch_invariance(system.encode, texts[::step][: profile.invariance])
    return figures, ours


def add_mixed(
    figures: Mapping[str, Figures],
    vectors: Mapping[str, TaskVectors],
    data: TaskData,
    reference: TaskVectors,
) -> None:
    """Add to each precision's quality what queries of every other reach on its documents, at the full dimension.

    Args:
        figures: fields of a row by precision; ``queries`` is added to each set.
        vectors: by precision.
        data: the task's.
        reference: the yardstick's on both sides.
    """
    for evaluation in data.evaluations:
        whole = reference.qualities[evaluation.name, data.dims[0]]
        for documents, its in figures.items():
            mixed = {}
            for queries, others in vectors.items():
                columns = Columns(
                    first=others.columns[evaluation.name].first,
                    second=vectors[documents].columns[evaluation.name].second,
                )
                found = column_quality(evaluation, columns, data.dims[0], data.normalize)
                mixed[queries] = against(evaluation, found, whole)
            its["quality"][evaluation.name]["queries"] = mixed


def _formats(
    system: EmbedgeSystem,
    evaluation: EvalSet,
    data: TaskData,
    ours: TaskVectors,
    reference: TaskVectors,
) -> dict[str, dict[str, Figures]]:
    """Return the quality of each output format at each dimension, against the yardstick's at its full one."""
    whole = reference.qualities[evaluation.name, data.dims[0]]
    formats: dict[str, dict[str, Figures]] = {}
    for dim in data.dims:
        columns = ours.columns[evaluation.name].cut(dim, data.normalize)
        found = format_qualities(
            evaluation, columns, _ranges(system, evaluation, data, ours, columns)
        )
        found = {"float32": ours.qualities[evaluation.name, dim], **found}
        for name, quality in found.items():
            formats.setdefault(name, {})[str(dim)] = against(evaluation, quality, whole)
    return formats


def _ranges(
    system: EmbedgeSystem, evaluation: EvalSet, data: TaskData, ours: TaskVectors, columns: Columns
) -> Vectors:
    """Return the ranges of 8-bit codes: of a set's pages, where it has some; a bundle's own are of texts."""
    if evaluation.modality == "image":
        return ranges_of(columns.second)
    dim = columns.second.shape[1]
    texts = truncated(ours.texts, dim, data.normalize).astype(np.float32)
    return system.output_ranges(dim, texts)


def _page_figures(
    evaluation: EvalSet, data: TaskData, ours: TaskVectors, reference: TaskVectors
) -> Figures:
    """Return what is measured of pages alone: nDCG@5, multi-vectors, alignment before and after quantization."""
    name = evaluation.name
    figures: Figures = {"pages": len(set(evaluation.passages))}
    figures["ndcg@5"] = {
        str(dim): against(
            evaluation,
            column_quality(evaluation, ours.columns[name], dim, data.normalize, 5),
            column_quality(evaluation, reference.columns[name], dim, data.normalize, 5),
        )
        for dim in data.dims
    }
    figures["alignment"] = {
        kind: align_columns(evaluation, its.columns[name].first, its.columns[name].second)
        for kind, its in (("reference", reference), ("value", ours))
    }
    if name in ours.tokens:
        figures["multi_vector"] = {
            f"ndcg@{depth}": against(
                evaluation, ours.tokens[name][depth], reference.tokens[name][depth]
            )
            for depth in DEPTHS
        }
    return figures


def image_figures(
    systems: Sequence[System],
    vectors: Mapping[str, TaskVectors],
    data: TaskData,
    reference: TaskVectors,
    profile: Profile,
    *,
    timed: bool,
) -> dict[str, dict[str, Figures]]:
    """Return by system what each image budget costs and keeps, by the budget as a string.

    Args:
        systems: all that are compared.
        vectors: of the bundle's precisions.
        data: the task's, with a set of pages.
        reference: the yardstick's.
        profile: pages to time.
        timed: whether pages are timed.
    """
    pages = data.pages
    if pages is None:
        return {}
    columns = reference.columns[pages.name]
    whole = {
        depth: column_quality(pages, columns, data.dims[0], data.normalize, depth)
        for depth in DEPTHS
    }
    able = [system for system in systems if isinstance(system, PageSystem)]
    found: dict[str, dict[str, Figures]] = {system.name: {} for system in able}
    for system in able:
        if system.precision is not None:
            own = vectors[system.precision].columns[pages.name]
            found[system.name] = budget_figures(
                system, pages, own, whole, data.budgets, data.normalize
            )
    if timed and profile.pages:
        for name, budgets in page_times(able, pages, data.budgets, profile).items():
            for budget, times in budgets.items():
                found[name][budget] = found[name].get(budget, {}) | times
    return found


def latency(
    systems: Sequence[System],
    tokens: TextTokens,
    texts: Sequence[str],
    singles: Sequence[str],
    role: str | None,
    shapes: Sequence[Shape],
    profile: Profile,
    step: Callable[[str], None],
) -> dict[str, Figures]:
    """Return ``single`` and ``shapes`` of each system, timed in turn.

    Shapes of more tokens than the model takes are passed over.

    Args:
        systems: all that are compared.
        tokens: makes the ids that every system gets.
        texts: where the ids come from.
        singles: what is embedded one by one.
        role: in which, ``"query"``, ``"document"`` or ``None``: it brings a prompt.
        shapes: of the token batches.
        profile: rounds.
        step: told the name of what is about to be timed.
    """
    result: dict[str, Figures] = {s.name: {"single": {}, "shapes": {}} for s in systems}
    for shape in shapes:
        if shape.tokens > tokens.max_length:
            continue
        step(shape.name)
        ids, mask = tokens.exact(texts, shape.batch, shape.tokens)
        runs = {s.name: functools.partial(s.forward, ids, mask) for s in systems}
        times = alternate(runs, shape.rounds(profile.rounds), warm_up=profile.warm_up)
        for name, values in times.items():
            result[name]["shapes"][shape.name] = _shape_figures(shape, values, times)
    if not singles:
        return result
    step("single texts")
    encode = {s.name: functools.partial(s.encode, role=role) for s in systems}
    for name, figures in single_texts(encode, singles, profile).items():
        result[name]["single"] = figures | {"role": role}
    return result


def longest_role(source: Source) -> str | None:
    """Return the role whose prompt has the most characters, what users pay for; ``None`` where there is no prompt."""
    roles: tuple[str | None, ...] = (None, "query", "document")
    return max(roles, key=lambda role: len(source.prompt(role)))


def single_texts(
    encode: Mapping[str, Callable[[Sequence[str], int], object]],
    texts: Sequence[str],
    profile: Profile,
) -> dict[str, Figures]:
    """Return what :func:`spread` says of texts one by one, tokenization included, and ``texts``, by system.

    Args:
        encode: by the system's name, from texts and a batch size.
        texts: that are timed.
        profile: how often.
    """
    runs = {name: functools.partial(_alone, call) for name, call in encode.items()}
    times = one_by_one(runs, texts, profile.single_rounds)
    return {name: spread(values) | {"texts": len(texts)} for name, values in times.items()}


def _alone(call: Callable[[Sequence[str], int], object], text: str) -> object:
    return call([text], 1)


def _shape_figures(shape: Shape, times_ms: Times, all_times: dict[str, Times]) -> Figures:
    median = float(np.median(times_ms))
    figures: Figures = {
        "median_ms": median,
        "p95_ms": float(np.percentile(times_ms, 95)),
        "rounds": len(times_ms),
        "texts_per_s": shape.batch / median * 1000,
        "tokens_per_s": shape.batch * shape.tokens / median * 1000,
        "times_as_fast_as": {other: ratio(theirs, times_ms) for other, theirs in all_times.items()},
    }
    return figures
