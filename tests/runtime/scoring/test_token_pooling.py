"""Hierarchical pooling beside SciPy's linkage, and sentence-transformers' where version 6 is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from embedge.runtime.scoring.token_pooling import pool_tokens

Array = NDArray[Any]


def tokens(count: int, dim: int = 16, seed: int = 1) -> Array:
    values = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    unit: Array = values / np.linalg.norm(values, axis=1, keepdims=True)
    return unit


def in_any_order(vectors: Array) -> Array:
    ordered: Array = vectors[np.lexsort(vectors.T[::-1].round(4))]
    return ordered


@pytest.mark.parametrize("count", [3, 7, 60, 200])
@pytest.mark.parametrize("factor", [1.5, 2, 5])
def test_clusters_are_those_of_scipy(count: int, factor: float) -> None:
    vectors = tokens(count)
    rest = vectors[1:]
    distances = np.clip(1 - rest @ rest.T, 0, 2)
    linkage = hierarchy.linkage(squareform(distances, checks=False), method="ward")
    wanted = max(int(len(rest) // factor), 1)
    labels = hierarchy.fcluster(linkage, t=wanted, criterion="maxclust")
    means = np.stack([rest[labels == label].mean(0) for label in np.unique(labels)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    pooled = pool_tokens(vectors, factor)
    np.testing.assert_array_equal(pooled[0], vectors[0])  # the first is left as it is
    np.testing.assert_allclose(in_any_order(pooled[1:]), in_any_order(means), atol=1e-5)


@pytest.mark.slow  # imports torch
def test_vectors_are_those_of_sentence_transformers() -> None:
    theirs = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")
    torch = pytest.importorskip("torch")
    vectors = tokens(50)
    [expected] = theirs.HierarchicalTokenPooling(pool_factor=2).pool([torch.from_numpy(vectors)])
    ours = pool_tokens(vectors, 2)
    np.testing.assert_allclose(in_any_order(ours), in_any_order(expected.numpy()), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_to_join_stay(count: int) -> None:
    vectors = tokens(count)
    np.testing.assert_array_equal(pool_tokens(vectors, 3), vectors)


def test_equal_vectors_join_first() -> None:
    first, one, other = tokens(3)
    pooled = pool_tokens(np.stack([first, one, other, one, other]), 2)
    np.testing.assert_allclose(pooled, [first, one, other], atol=1e-6)
