"""How well vectors do a task: nDCG at 10 or another depth, Spearman's correlation, and intervals of a difference.

The 95 % intervals are paired: the same resampled rows for both systems. For Spearman the ranks are
taken once, on all pairs, and the resampling is of ranks: exact enough for a comparison, and fast.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from embedge.bench.documents import Document
from embedge.bench.measure.texts import EvalSet
from embedge.quant.fidelity import cosine_rows, spearman

__all__ = [
    "Interval",
    "Quality",
    "compare",
    "gains_of",
    "ndcg",
    "ndcg_of_order",
    "ndcg_of_scores",
    "quality",
    "truncated",
]

Floats = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What one system reaches on one set.

    Attributes:
        value: mean nDCG, or Spearman's correlation; 0…1.
        items: nDCG of each query, or cosine of each pair, float64 ``[n]``.
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


def quality(evaluation: EvalSet, first: Floats, second: Floats, depth: int = 10) -> Quality:
    """Return the quality of the vectors of a set's two columns, each float64 ``[n, dim]``; nDCG at ``depth``."""
    if evaluation.scores is not None:
        cosines = cosine_rows(first, second)
        return Quality(value=spearman(cosines, np.array(evaluation.scores)), items=cosines)
    items = ndcg(evaluation, first, second, depth)
    return Quality(value=float(items.mean()), items=items)


def ndcg(evaluation: EvalSet, queries: Floats, passages: Floats, depth: int = 10) -> Floats:
    """Return nDCG of each different query over all different passages, float64 ``[queries]``.

    Args:
        evaluation: the rows; equal texts, and equal pages, count once.
        queries: float64 ``[rows, dim]``.
        passages: float64 ``[rows and others, dim]``.
        depth: how many of the best count.
    """
    query_rows, _ = _unique(evaluation.first)
    passage_rows, _ = _unique(evaluation.passages)
    return ndcg_of_scores(evaluation, queries[query_rows] @ passages[passage_rows].T, depth)


def ndcg_of_scores(evaluation: EvalSet, scores: Floats, depth: int = 10) -> Floats:
    """Return nDCG of each different query, float64 ``[queries]``.

    Args:
        evaluation: as for :func:`ndcg_of_order`.
        scores: float64 ``[queries, passages]``, of each different query and passage in order of appearance.
        depth: how many of the best count.
    """
    return ndcg_of_order(evaluation, [_best(row, depth) for row in scores], depth)


def ndcg_of_order(
    evaluation: EvalSet, order: Iterable[NDArray[np.integer[Any]]], depth: int = 10
) -> Floats:
    """Return nDCG of each different query, float64 ``[queries]``.

    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002; gains are linear, as
    in trec_eval.

    Args:
        evaluation: the rows; every passage that some row gives for a query is relevant, with the row's gain or 1.
        order: for each different query the numbers of its best different passages, the best first.
        depth: how many of the best count.
    """
    gains = gains_of(evaluation)
    discount = 1.0 / np.log2(np.arange(depth) + 2.0)
    items = []
    for its, best in zip(gains, order, strict=True):
        found = [its.get(int(passage), 0.0) for passage in best[:depth]]
        ideal = sorted(its.values(), reverse=True)[:depth]
        most = float(np.dot(ideal, discount[: len(ideal)]))
        items.append(float(np.dot(found, discount[: len(found)])) / most if most else 0.0)
    return np.array(items)


def gains_of(evaluation: EvalSet) -> list[dict[int, float]]:
    """Return the relevant passages of each different query with their gains, both numbered in order of appearance."""
    _, query_of = _unique(evaluation.first)
    _, passage_of = _unique(evaluation.passages)
    gains: list[dict[int, float]] = [{} for _ in range(max(query_of) + 1)]
    for row, query in enumerate(query_of):
        gains[query][int(passage_of[row])] = evaluation.gains[row] if evaluation.gains else 1.0
    return gains


def _best(scores: Floats, count: int) -> NDArray[np.intp]:
    """Return where the highest scores are, the highest first, the first of equal ones first."""
    if len(scores) <= count:
        return np.argsort(-scores, kind="stable")
    bound = np.partition(scores, -count)[-count]
    within = np.flatnonzero(scores >= bound)
    return within[np.argsort(-scores[within], kind="stable")][:count]


def compare(evaluation: EvalSet, ours: Quality, reference: Quality, seed: int = 0) -> Interval:
    """Return the difference of two systems on one set with its paired bootstrap interval."""
    n = len(ours.items)
    weights = _weights(n, seed)
    if evaluation.scores is None:
        draws = weights @ (ours.items - reference.items)
    else:
        scores = np.array(evaluation.scores)
        draws = _weighted(weights, ours.items, scores) - _weighted(weights, reference.items, scores)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(difference=ours.value - reference.value, low=float(low), high=float(high))


@functools.lru_cache(maxsize=8)
def _weights(n: int, seed: int) -> Floats:
    """Return how often each of ``n`` items is drawn, as shares, float64 ``[RESAMPLES, n]``."""
    drawn: Floats = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    drawn.flags.writeable = False
    return drawn


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


def _unique(texts: tuple[Document, ...]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the row of each different text's or page's first appearance, and each row's number."""
    numbers: dict[Document, int] = {}
    of = np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.intp)
    _, first = np.unique(of, return_index=True)
    return first.astype(np.intp), of
