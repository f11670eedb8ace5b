"""Quality figures equal hand-computed ones, and intervals hold a known difference."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.bench.measure.quality import Quality, compare, ndcg, quality, truncated
from embedge.bench.measure.texts import EvalSet

EXACT = 1e-12  # a handful of float64 operations


def one_hot(rows: list[int], width: int = 12) -> np.ndarray:
    return np.eye(width)[rows]


def test_ndcg_discounts_by_the_logarithm_of_the_rank() -> None:
    # Passage scores fall with their number, so query i finds its own passage at rank i + 1.
    passages = np.stack([np.linspace(1, 0, 12), np.zeros(12)], axis=1)
    queries = np.tile([1.0, 0.0], (12, 1))
    names = tuple(f"text {i}" for i in range(12))
    evaluation = EvalSet(name="x", first=names, second=tuple(f"p{i}" for i in range(12)))

    found = ndcg(evaluation, queries, passages)

    expected = [1 / np.log2(i + 2) if i < 10 else 0.0 for i in range(12)]
    np.testing.assert_allclose(found, expected, atol=EXACT)


def test_two_relevant_passages_at_ranks_1_and_3_give_their_share_of_the_ideal() -> None:
    evaluation = EvalSet(name="x", first=("q", "q", "r"), second=("a", "b", "c"))
    queries, passages = one_hot([0, 0, 1], 2), np.array([[0.9, 0.0], [0.1, 0.0], [0.5, 1.0]])

    found = ndcg(evaluation, queries, passages)

    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(found, [(1 + 1 / np.log2(4)) / ideal, 1.0], atol=EXACT)


def test_a_passage_that_two_queries_share_is_one_passage() -> None:
    evaluation = EvalSet(name="x", first=("q", "r"), second=("same", "same"))

    found = ndcg(evaluation, one_hot([0, 1]), one_hot([0, 0]))

    np.testing.assert_array_equal(found, [1.0, 1.0])


def test_graded_pairs_are_scored_as_scipy_scores_them() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 40, 8))
    scores = tuple(generator.integers(0, 5, 40).astype(float))  # with ties
    evaluation = EvalSet(name="x", first=("",) * 40, second=("",) * 40, scores=scores)

    found = quality(evaluation, first, second)

    cosines = (first * second).sum(1)
    cosines /= np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    assert found.value == pytest.approx(stats.spearmanr(cosines, scores).statistic, abs=EXACT)


def test_the_interval_of_a_constant_difference_is_that_difference() -> None:
    items = np.random.default_rng(0).random(200)
    evaluation = EvalSet(name="x", first=("",) * 200, second=("",) * 200)

    found = compare(evaluation, _quality(items + 0.02), _quality(items))

    np.testing.assert_allclose([found.difference, found.low, found.high], 0.02, atol=EXACT)


@pytest.mark.slow
def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    difference = np.random.default_rng(1).normal(0.01, 0.1, 1000)
    evaluation = EvalSet(name="x", first=("",) * 1000, second=("",) * 1000)

    found = compare(evaluation, _quality(difference), _quality(np.zeros(1000)))

    expected = 2 * 1.96 * difference.std() / np.sqrt(1000)
    # 2,000 resamples place a 2.5 % quantile within some 5 % of the width.
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    assert found.low < difference.mean() < found.high


def test_a_system_compared_with_itself_differs_by_nothing() -> None:
    generator = np.random.default_rng(2)
    scores = tuple(generator.random(50))
    evaluation = EvalSet(name="x", first=("",) * 50, second=("",) * 50, scores=scores)
    same = _quality(generator.random(50))

    found = compare(evaluation, same, same)

    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_the_interval_of_two_correlations_holds_the_difference_scipy_bootstraps() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(3)
    truth = generator.random(400)
    ours, theirs = (truth + generator.normal(0, noise, 400) for noise in (0.2, 0.3))
    evaluation = EvalSet(name="x", first=("",) * 400, second=("",) * 400, scores=tuple(truth))
    values = [float(stats.spearmanr(x, truth).statistic) for x in (ours, theirs)]

    found = compare(
        evaluation, Quality(value=values[0], items=ours), Quality(value=values[1], items=theirs)
    )

    draws = []
    for _ in range(400):
        rows = generator.integers(0, 400, 400)
        a, b = (stats.spearmanr(x[rows], truth[rows]).statistic for x in (ours, theirs))
        draws.append(a - b)
    low, high = np.percentile(draws, [2.5, 97.5])
    # Ranks taken once instead of in every resample: ends within a tenth of the width.
    bound = 0.15 * (high - low)
    assert found.low == pytest.approx(low, abs=bound)
    assert found.high == pytest.approx(high, abs=bound)


def test_a_cut_vector_has_length_1_again_only_where_the_source_normalizes() -> None:
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], dtype=np.float32)

    expected = np.array([[0.6, 0.8], [0.0, 0.0]])
    np.testing.assert_allclose(truncated(vectors, 2), expected, atol=EXACT)
    np.testing.assert_array_equal(truncated(vectors, 2, normalize=False), [[3, 4], [0, 0]])


def _quality(items: np.ndarray) -> Quality:
    return Quality(value=float(items.mean()), items=items)
