"""Fidelity measures equal what SciPy and pencil and paper say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from embedge.quant import fidelity

RNG = np.random.default_rng(0)


def test_cosines_of_rows_are_those_by_hand() -> None:
    a = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    b = np.array([[2.0, 0.0], [4.0, 3.0], [0.0, 5.0]])
    assert fidelity.cosine_rows(a, b) == pytest.approx([1, 24 / 25, 0])


def test_two_zero_rows_are_equal_and_one_is_unrelated() -> None:
    a, b = np.zeros((2, 3)), np.array([[0.0, 0, 0], [1, 2, 3]])
    assert fidelity.cosine_rows(a, b).tolist() == [1, 0]


def test_cosines_of_float32_rows_are_summed_in_float64() -> None:
    a = RNG.normal(0, 1, (5, 4096)).astype(np.float32)
    assert np.abs(fidelity.cosine_rows(a, a * np.float32(4)) - 1).max() < 1e-14


def test_rows_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        fidelity.cosine_rows(np.ones((2, 3)), np.ones((2, 4)))


@pytest.mark.parametrize("levels", [1000, 4], ids=["few ties", "many ties"])
def test_spearman_is_scipys(levels: int) -> None:
    x, y = RNG.integers(0, levels, (2, 200)).astype(float)
    assert fidelity.spearman(x, x + y) == pytest.approx(spearmanr(x, x + y).statistic)


def test_spearman_of_a_constant_is_not_a_number() -> None:
    assert np.isnan(fidelity.spearman(np.ones(4), np.arange(4.0)))


def test_pair_spearman_ranks_all_pairs_once() -> None:
    a = RNG.normal(0, 1, (12, 5))
    b = a + RNG.normal(0, 0.5, a.shape)
    upper = np.triu_indices(12, 1)
    cosines = []
    for vectors in (a, b):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines.append((unit @ unit.T)[upper])
    expected = spearmanr(*cosines).statistic
    assert fidelity.pair_spearman(a, b) == pytest.approx(expected)


def test_pair_spearman_compares_sets_of_other_dimensions() -> None:
    a = RNG.normal(0, 1, (6, 5))
    assert fidelity.pair_spearman(a, np.hstack([a, np.zeros((6, 2))])) == pytest.approx(1)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 6)])
def test_pair_spearman_needs_two_sets_of_one_size(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="same size"):
        fidelity.pair_spearman(np.ones((n, 2)), np.ones((m, 2)))


def test_top_k_overlap_by_hand() -> None:
    angles = np.deg2rad([0, 10, 25, 90])
    a = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    b = a[[0, 3, 2, 1]]
    # nearest in a: 1, 0, 1, 2; in b (10° and 90° swapped): 3, 2, 3, 0
    assert fidelity.top_k_overlap(a, b, k=1) == 0
    assert fidelity.top_k_overlap(a, a, k=1) == 1
    # two nearest in a: {1,2} {0,2} {0,1} {1,2}; in b: {2,3} {2,3} {0,3} {0,2}
    assert fidelity.top_k_overlap(a, b, k=2) == 0.5


def test_top_k_overlap_needs_more_than_k_rows() -> None:
    with pytest.raises(ValueError, match="k=10"):
        fidelity.top_k_overlap(np.ones((10, 2)), np.ones((10, 2)))
