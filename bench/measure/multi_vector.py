"""Late interaction: how near the vectors of all tokens are, and how well the scores find documents.

Every text is embedded as a query and as a document. Cosines are of tokens' vectors; orders and quality go by
the model's own score of a query for a document (MaxSim).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.errors import BenchError
from embedge.bench.measure.fidelity import batch_invariance
from embedge.bench.measure.quality import Quality, compare, ndcg_of_scores
from embedge.bench.measure.task import TORCH_FP32, TaskData
from embedge.bench.measure.texts import EvalSet
from embedge.bench.options import Profile
from embedge.bench.systems.multi_vector import MultiVectorSystem, Rows, Scores
from embedge.quant.fidelity import cosine_rows, spearman

__all__ = ["MultiVectors", "multi_vectors", "multi_vectors_against"]

_ROLES = ("query", "document")


@dataclass(frozen=True, kw_only=True)
class MultiVectors:
    """What one system gives for a task's data.

    Attributes:
        rows: by role, float32 ``[tokens, dim]`` of each text.
        scores: of each text as a query for each as a document, float32 ``[texts, texts]``.
        qualities: by evaluation set.
    """

    rows: dict[str, Rows]
    scores: Scores
    qualities: dict[str, Quality] = field(default_factory=dict)


def multi_vectors(system: MultiVectorSystem, data: TaskData) -> MultiVectors:
    """Return a system's vectors, scores and qualities for a task's data."""
    texts = [text.text for text in data.texts]
    rows = {role: system.encode(texts, role=role) for role in _ROLES}
    return MultiVectors(
        rows=rows,
        scores=system.scores(rows["query"], rows["document"]),
        qualities={
            evaluation.name: _quality(system, evaluation) for evaluation in data.evaluations
        },
    )


def multi_vectors_against(
    system: MultiVectorSystem, data: TaskData, reference: MultiVectors, profile: Profile
) -> dict[str, Any]:
    """Return the fields of a row that come from vectors: fidelity, quality, invariance.

    Raises:
        BenchError: a text has not as many vectors as in the reference.
    """
    own = profile.torch_quality or system.name != TORCH_FP32
    ours = multi_vectors(system, data) if own else reference
    cosines = {role: _cosines(ours.rows[role], reference.rows[role], role) for role in _ROLES}
    dim = str(reference.rows["query"][0].shape[1])
    figures: dict[str, Any] = {
        "fidelity": {
            dim: {
                **_cosine_figures(np.concatenate([*cosines["query"], *cosines["document"]])),
                "pair_spearman": spearman(ours.scores.ravel(), reference.scores.ravel()),
                "top10_overlap": _overlap(ours.scores, reference.scores),
            }
        },
        "fidelity_by_kind": _by_kind(cosines, [text.kind for text in data.texts]),
        "quality": {
            evaluation.name: {
                "metric": evaluation.metric,
                "items": len(ours.qualities[evaluation.name].items),
                "dims": {dim: _compared(evaluation, ours, reference)},
            }
            for evaluation in data.evaluations
        },
    }
    if system.role != "torch" and profile.invariance:
        texts = [text.text for text in data.texts]
        step = max(1, len(texts) // profile.invariance)
        chosen = texts[::step][: profile.invariance]
        figures["invariance"] = batch_invariance(
            lambda some, batch_size: system.encode(some, batch_size, "document"), chosen
        )
    return figures


def _quality(system: MultiVectorSystem, evaluation: EvalSet) -> Quality:
    """nDCG@10 of the scores of all queries for all passages, or Spearman's correlation of those of the pairs."""
    # no late-interaction bundle takes images, so a passage is a text
    columns = (evaluation.first, tuple(map(str, evaluation.passages)))
    different = [list(dict.fromkeys(column)) for column in columns]
    first, second = (
        system.encode(texts, role=role)
        for texts, role in zip(different, evaluation.roles, strict=True)
    )
    if evaluation.scores is None:
        items = ndcg_of_scores(evaluation, np.asarray(system.scores(first, second), np.float64))
        return Quality(value=float(items.mean()), items=items)
    rows = [
        dict(zip(texts, some, strict=True))
        for texts, some in zip(different, (first, second), strict=True)
    ]
    pairs = [
        system.scores([rows[0][one]], [rows[1][other]])[0, 0]
        for one, other in zip(*columns, strict=True)
    ]
    items = np.array(pairs, np.float64)
    return Quality(value=spearman(items, np.array(evaluation.scores)), items=items)


def _compared(evaluation: EvalSet, ours: MultiVectors, reference: MultiVectors) -> dict[str, float]:
    one, other = (vectors.qualities[evaluation.name] for vectors in (ours, reference))
    return {"value": one.value, "reference": other.value, **asdict(compare(evaluation, one, other))}


def _cosines(ours: Rows, theirs: Rows, role: str) -> list[NDArray[np.float64]]:
    """Cosines of the vectors of all tokens, float64 ``[tokens]`` a text."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape:
            raise BenchError(
                f"{role} {number}: expected {list(other.shape)} vectors and channels as the reference has, found "
                f"{list(one.shape)}; is the bundle of this model?"
            )
    return [cosine_rows(one, other) for one, other in zip(ours, theirs, strict=True)]


def _cosine_figures(cosines: NDArray[np.float64]) -> dict[str, float]:
    return {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}


def _by_kind(
    cosines: dict[str, list[NDArray[np.float64]]], kinds: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Mean and lowest cosine of the tokens of all queries, of all documents, and of each kind of document."""
    documents = cosines["document"]
    groups = {"all as queries": cosines["query"], "all as documents": documents}
    for kind in dict.fromkeys(kinds):
        groups[kind] = [one for one, its in zip(documents, kinds, strict=True) if its == kind]
    return {
        name: {"texts": len(group), **_cosine_figures(np.concatenate(group))}
        for name, group in groups.items()
    }


def _overlap(ours: Scores, theirs: Scores) -> float:
    """The share of each query's ten best documents that both have, on average."""
    best = (np.argsort(-scores, axis=1, kind="stable")[:, :10] for scores in (ours, theirs))
    shares = [len({*one} & {*other}) / len(one) for one, other in zip(*best, strict=True)]
    return float(np.mean(shares))
