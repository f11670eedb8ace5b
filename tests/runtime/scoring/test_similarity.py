from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedge.runtime import EmbedgeValueError
from embedge.runtime.scoring import late_interaction
from embedge.runtime.scoring.late_interaction import max_sim
from embedge.runtime.scoring.similarity import normalized, similarity, similarity_pairwise

GENERATOR = np.random.default_rng(3)
A = GENERATOR.normal(size=(3, 5)).astype(np.float32)
B = GENERATOR.normal(size=(4, 5)).astype(np.float32)


def test_cosine_and_dot_are_by_the_manifest() -> None:
    np.testing.assert_allclose(similarity(A, B, "dot"), A @ B.T, rtol=1e-6)
    unit = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (A, B)]
    np.testing.assert_allclose(similarity(A, B, "cosine"), unit[0] @ unit[1].T, rtol=1e-5)


def test_one_vector_is_a_row() -> None:
    assert similarity(A[0], B, "cosine").shape == (1, 4)
    assert similarity(list(A), B[0], "cosine").shape == (3, 1)


def test_zero_vectors_have_no_similarity() -> None:
    np.testing.assert_array_equal(similarity(np.zeros((1, 5)), B, "cosine"), np.zeros((1, 4)))
    np.testing.assert_array_equal(normalized(np.zeros((2, 3), np.float32)), np.zeros((2, 3)))


@pytest.mark.parametrize(("a", "b", "shape"), [([], B, (0, 4)), (A, [], (3, 0)), ([], [], (0, 0))])
def test_nothing_gives_an_empty_matrix(a: Any, b: Any, shape: tuple[int, int]) -> None:
    assert similarity(a, b, "cosine").shape == shape


def by_hand(queries: Any, documents: Any) -> Any:
    scores = np.zeros((len(queries), len(documents)))
    for row, query in enumerate(queries):
        for column, document in enumerate(documents):
            if len(query) and len(document):
                scores[row, column] = (query @ document.T).max(axis=1).sum()
    return scores


def multi_vectors(lengths: Any, dim: int = 6) -> list[Any]:
    return [GENERATOR.normal(size=(n, dim)).astype(np.float32) for n in lengths]


@pytest.mark.parametrize(
    "limits",
    [{}, {"_BLOCK_VALUES": 10}, {"_STEP_TOKENS": 8}, {"_STEP_TOKENS": 1}, {"_WIDE_ROW": 1}],
    ids=str,
)
def test_late_interaction_sums_each_query_tokens_best_match(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(late_interaction, name, value)
    queries, documents = multi_vectors((3, 0, 7, 1, 20)), multi_vectors((5, 1, 0, 9, 400, 31, 1))
    scores = similarity(queries, documents, "cosine")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, by_hand(queries, documents), rtol=1e-5)


@pytest.mark.slow
def test_one_query_against_long_and_short_documents() -> None:
    query, documents = multi_vectors([32], 128), multi_vectors([768, 2, 1500, 767, 1] * 3, 128)
    np.testing.assert_allclose(max_sim(query, documents), by_hand(query, documents), rtol=1e-4)


def test_multi_vectors_of_one_length_may_be_one_array() -> None:
    queries, documents = np.stack(multi_vectors([4] * 2)), np.stack(multi_vectors([9] * 3))
    np.testing.assert_allclose(
        similarity(queries, documents, "dot"), by_hand(queries, documents), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("queries", "documents", "shape"),
    [
        ([], [], (0, 0)),
        ([(0, 6)], [], (1, 0)),
        ([(0, 6)], [(0, 6)] * 2, (1, 2)),
        ([(2, 6), (0, 6)], [(0, 6)], (2, 1)),
        ([(0, 6)], [(3, 6), (1, 6)], (1, 2)),
    ],
)
def test_multi_vectors_without_tokens_score_zero(
    queries: Any, documents: Any, shape: tuple[int, int]
) -> None:
    scores = max_sim(*([np.ones(s, np.float32) for s in side] for side in (queries, documents)))
    np.testing.assert_array_equal(scores, np.zeros(shape))


def test_late_interaction_adds_in_float32() -> None:
    half = np.full((3000, 1), 1, np.float16)  # a float16 sum stops at 2048
    scores = similarity([half], [half], "cosine")
    assert scores.dtype == np.float32
    assert scores.tolist() == [[3000.0]]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (A, B[:, :3], "different dimensions: 5 and 3"),
        ([A], [B[:, :3]], "multi-vectors of different dimensions: 3, 5"),
        ([A], B, "multi-vectors with single vectors"),
        ([[1.0], [1.0, 2.0]], B, "a: not an array of vectors of one length"),
        (A, [["x"]], "multi-vectors with single vectors|b: not an array"),
    ],
)
def test_what_does_not_fit_is_refused(a: Any, b: Any, message: str) -> None:
    with pytest.raises(EmbedgeValueError, match=message):
        similarity(a, b, "cosine")


class TestPairwise:
    @pytest.mark.parametrize("kind", ["cosine", "dot"])
    def test_it_is_the_diagonal_of_all_with_all(self, kind: str) -> None:
        a, b = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
        found = similarity_pairwise(a, b, kind)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.diagonal(similarity(a, b, kind)), atol=1e-6)

    def test_of_multi_vectors(self) -> None:
        generator = np.random.default_rng(0)
        a, b = ([generator.normal(size=(n, 4)) for n in lengths] for lengths in ((2, 3), (5, 1)))
        found = similarity_pairwise(a, b, "cosine")
        np.testing.assert_allclose(found, np.diagonal(similarity(a, b, "cosine")), atol=1e-6)

    def test_what_does_not_pair_is_refused(self) -> None:
        ones = np.ones((2, 3), np.float32)
        with pytest.raises(EmbedgeValueError, match="found 2 and 1; pass as many"):
            similarity_pairwise(ones, ones[:1], "dot")
        with pytest.raises(EmbedgeValueError, match="different dimensions: 3 and 2"):
            similarity_pairwise(ones, ones[:, :2], "dot")
        assert similarity_pairwise(ones[:0], ones[:0], "dot").shape == (0,)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e30])
def test_cosine_does_not_depend_on_the_length_of_a_vector(size: float) -> None:
    a, b = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[4.0, 3.0]])
    expected = [[0.96], [0.0]]
    np.testing.assert_allclose(similarity(a * size, b * size, "cosine"), expected, rtol=1e-6)
    pairs = similarity_pairwise(a[:1] * size, b * size, "cosine")
    np.testing.assert_allclose(pairs, [0.96], rtol=1e-6)


def test_cosine_of_what_is_not_finite_is_nan_and_not_0() -> None:
    bad = np.array([[np.nan, 1.0], [np.inf, 1.0], [1.0, 0.0]])
    found = similarity(bad, np.array([[1.0, 0.0]]), "cosine")[:, 0]
    assert np.isnan(found[:2]).all()
    assert found[2] == 1
