"""Quality of stored formats equals that of codes made and scored by hand; graded corpora are scored as trec_eval's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedge.bench.measure.labelled import Columns, column_quality, format_qualities
from embedge.bench.measure.quality import ndcg_of_order, ndcg_of_scores
from embedge.bench.measure.task import TaskData, TaskVectors, add_mixed
from embedge.bench.measure.texts import EvalSet

EXACT = 1e-12
DIM = 16


@pytest.fixture
def columns() -> Columns:
    """Queries near their passages, unit length, float32 [40, 16] and [60, 16]."""
    generator = np.random.default_rng(0)
    passages = generator.normal(size=(60, DIM))
    queries = passages[:40] + generator.normal(size=(40, DIM)) * 0.8
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages)]
    return Columns(first=unit[0].astype(np.float32), second=unit[1].astype(np.float32))


@pytest.fixture
def evaluation() -> EvalSet:
    return EvalSet(
        name="x",
        first=tuple(f"q{i}" for i in range(40)),
        second=tuple(f"p{i}" for i in range(40)),
        others=tuple(f"p{i}" for i in range(40, 60)),
    )


def ndcg_by_hand(scores: Any) -> float:
    """Of the passage with the query's own number."""
    own = np.diag(scores)[:, None]
    ranks = (scores > own).sum(1) + np.array(
        [(scores[i, :i] == scores[i, i]).sum() for i in range(len(scores))]
    )
    return float(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean())


def int8_by_hand(vectors: Any, ranges: Any) -> Any:
    """The middle of each of 255 steps, clipped."""
    step = (ranges[1] - ranges[0]) / 255
    codes = np.clip(np.floor((vectors - ranges[0]) / step), 0, 255)
    return ranges[0] + (codes + 0.5) * step


def test_stored_formats_are_worth_what_their_codes_are(
    columns: Columns, evaluation: EvalSet
) -> None:
    ranges = np.stack([np.full(DIM, -0.5), np.full(DIM, 0.5)]).astype(np.float32)  # some clipped

    found = format_qualities(evaluation, columns, ranges)

    first, second = columns.first.astype(np.float64), columns.second.astype(np.float64)
    coded = int8_by_hand(second, ranges.astype(np.float64))
    bits = np.where(first > 0, 1, -1) @ np.where(second > 0, 1, -1).T
    rescored = np.full(bits.shape, -np.inf)
    best = np.argsort(-bits, axis=1, kind="stable")[:, :40]
    np.put_along_axis(rescored, best, np.take_along_axis(first @ coded.T, best, 1), 1)
    expected = {
        "float16": ndcg_by_hand(first @ columns.second.astype(np.float16).astype(float).T),
        "int8": ndcg_by_hand(first @ coded.T),
        "binary": ndcg_by_hand(bits),
        "binary+int8": ndcg_by_hand(rescored),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-3), name  # float32 ties
    assert found["binary"].value < found["binary+int8"].value < 1


def test_of_graded_pairs_both_sides_are_stored(columns: Columns) -> None:
    stats = pytest.importorskip("scipy.stats")
    scores = tuple(float(i % 5) for i in range(40))
    pairs = EvalSet(name="x", first=("a",) * 40, second=("b",) * 40, scores=scores)
    cut = Columns(first=columns.first, second=columns.second[:40])
    ranges = np.stack([np.full(DIM, -1.0), np.full(DIM, 1.0)]).astype(np.float32)

    found = format_qualities(pairs, cut, ranges)

    assert list(found) == ["float16", "int8", "binary"]
    signs = (np.where(c > 0, 1, -1) for c in (cut.first, cut.second))
    agreeing = np.multiply(*signs).sum(1)
    expected = stats.spearmanr(agreeing, scores).statistic
    assert found["binary"].value == pytest.approx(expected, abs=1e-3)  # ties in floats


def test_gains_are_graded_and_linear_and_others_stand_in_the_way() -> None:
    evaluation = EvalSet(
        name="x",
        first=("q", "q", "r"),
        second=("a", "b", "c"),
        gains=(2.0, 1.0, 1.0),
        others=("d",),
    )
    scores = np.array([[0.1, 0.9, 0.0, 0.5], [0.0, 0.0, 0.2, 0.9]])

    found = ndcg_of_scores(evaluation, scores)

    ideal = 2 + 1 / np.log2(3)  # gains 2 and 1
    expected = [(1 + 2 / np.log2(4)) / ideal, 1 / np.log2(3)]
    np.testing.assert_allclose(found, expected, atol=EXACT)
    order = [np.array([1, 3, 0]), np.array([3, 2])]
    np.testing.assert_allclose(ndcg_of_order(evaluation, order), expected, atol=EXACT)


def test_the_best_ten_are_those_of_a_stable_sort() -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 6, size=(30, 50)).astype(float)  # many are equal
    names = tuple(map(str, range(50)))
    evaluation = EvalSet(name="x", first=tuple(f"q{i}" for i in range(30)), second=names[:30],
                         others=names[30:])  # fmt: skip

    found = ndcg_of_scores(evaluation, scores)

    whole = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(found, ndcg_of_order(evaluation, list(whole)))


def test_queries_of_one_precision_meet_documents_of_another(
    columns: Columns, evaluation: EvalSet
) -> None:
    worse = Columns(first=-columns.first, second=columns.second)  # queries turned away
    texts = columns.second

    def vectors(of: Columns) -> TaskVectors:
        quality = column_quality(evaluation, of, DIM, True)
        return TaskVectors(texts=texts, columns={"x": of}, qualities={("x", DIM): quality})

    both = {"good": vectors(columns), "turned": vectors(worse)}
    figures: dict[str, Any] = {name: {"quality": {"x": {}}} for name in both}

    add_mixed(
        figures, both, TaskData(texts=(), evaluations=(evaluation,), dims=[DIM]), both["good"]
    )

    of_good = figures["good"]["quality"]["x"]["queries"]
    assert of_good["good"]["difference"] == 0
    assert of_good["turned"]["value"] == both["turned"].qualities["x", DIM].value
    assert of_good["turned"]["high"] < 0
    assert figures["turned"]["quality"]["x"]["queries"]["good"]["difference"] == 0
