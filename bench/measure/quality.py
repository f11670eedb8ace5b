"""How well vectors do a task: nDCG@10, Spearman's correlation, and intervals of a difference.

The 95 % intervals are paired: the same resampled rows for both systems. For Spearman the ranks are
taken once, on all pairs, and the resampling is of ranks: exact enough for a comparison, and fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from embedge.bench.measure.texts import EvalSet
from embedge.quant.fidelity import cosine_rows, spearman

__all__ = ["Interval", "Quality", "compare", "ndcg_at_10", "ndcg_of_scores", "truncated"]

Floats = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What one system reaches on one set.

    Attributes:
        value: mean nDCG@10, or Spearman's correlation; 0…1.
        items: nDCG@10 of each query, or cosine of each pair, float64 ``[n]``.
    """

    value: float
    items: Floats


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A difference ``ours − reference`` and its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


def truncated(vectors: NDArray[np.float32], dim: int, normalize: bool = True) -> Floats:
    """Return the first ``dim`` columns as float64, each row back to length 1 if ``normalize``."""
    cut = np.asarray(vectors[:, :dim], dtype=np.float64)
    if not normalize:
        return cut
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    result: Floats = cut / np.where(norms > 0, norms, 1.0)
    return result


def quality(evaluation: EvalSet, first: Floats, second: Floats) -> Quality:
    """Return the quality of the vectors of a set's two columns, each float64 ``[n, dim]``."""
    if evaluation.scores is not None:
        cosines = cosine_rows(first, second)
        return Quality(value=spearman(cosines, np.array(evaluation.scores)), items=cosines)
    items = ndcg_at_10(evaluation, first, second)
    return Quality(value=float(items.mean()), items=items)


def ndcg_at_10(evaluation: EvalSet, queries: Floats, passages: Floats) -> Floats:
    """Return nDCG@10 of each different query over all different passages, float64 ``[queries]``.

    Every passage that some row gives for the query is relevant, with gain 1.

    Args:
        evaluation: the rows; equal texts count once.
        queries: float64 ``[rows, dim]``.
        passages: float64 ``[rows, dim]``.
    """
    query_rows, _ = _unique(evaluation.first)
    passage_rows, _ = _unique(evaluation.second)
    return ndcg_of_scores(evaluation, queries[query_rows] @ passages[passage_rows].T)


def ndcg_of_scores(evaluation: EvalSet, scores: Floats) -> Floats:
    """Return nDCG@10 of each different query, float64 ``[queries]``.

    Args:
        evaluation: the rows; every passage that some row gives for a query is relevant, with gain 1.
        scores: float64 ``[queries, passages]``, of each different query and passage in order of appearance.
    """
    _, query_of = _unique(evaluation.first)
    _, passage_of = _unique(evaluation.second)
    relevant = np.zeros(scores.shape, dtype=bool)
    relevant[query_of, passage_of] = True
    top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    discount = 1.0 / np.log2(np.arange(10) + 2.0)
    gain = np.take_along_axis(relevant, top, axis=1) @ discount[: top.shape[1]]
    ideal = np.cumsum(discount)[np.minimum(relevant.sum(1), 10) - 1]
    result: Floats = gain / ideal
    return result


def compare(evaluation: EvalSet, ours: Quality, reference: Quality, seed: int = 0) -> Interval:
    """Return the difference of two systems on one set with its paired bootstrap interval."""
    n = len(ours.items)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    if evaluation.scores is None:
        draws = weights @ (ours.items - reference.items)
    else:
        scores = np.array(evaluation.scores)
        draws = _weighted(weights, ours.items, scores) - _weighted(weights, reference.items, scores)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(difference=ours.value - reference.value, low=float(low), high=float(high))


def _weighted(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Return the correlation of the ranks of ``x`` and ``y`` under each row of weights."""
    a, b = _centred_ranks(x), _centred_ranks(y)
    mean_a, mean_b = weights @ a, weights @ b
    covariance = weights @ (a * b) - mean_a * mean_b
    variance = (weights @ (a * a) - mean_a**2) * (weights @ (b * b) - mean_b**2)
    result: Floats = covariance / np.sqrt(np.maximum(variance, 1e-300))
    return result


def _centred_ranks(x: Floats) -> Floats:
    ranks: Floats = rankdata(x)
    centred: Floats = (ranks - ranks.mean()) / len(ranks)
    return centred


def _unique(texts: tuple[str, ...]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the row of each different text's first appearance, and each row's text number."""
    numbers: dict[str, int] = {}
    of = np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.intp)
    _, first = np.unique(of, return_index=True)
    return first.astype(np.intp), of
