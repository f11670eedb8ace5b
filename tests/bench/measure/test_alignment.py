"""Cosines within and across modalities, and the gap, against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest

from embedge.bench.measure.alignment import alignment


def cosine(*degrees: float) -> float:
    return float(np.mean(np.cos(np.radians(degrees))))


def test_pairs_and_the_gap_are_those_of_a_plane() -> None:
    angles = {"texts": np.radians([0, 10, 30]), "images": np.radians([60, 100])}
    texts, images = (np.stack([np.cos(a), np.sin(a)], 1) * 3 for a in angles.values())
    matches = np.array([[True, False], [True, False], [False, True]])

    found = alignment(texts, images, matches)

    assert found["matched"] == pytest.approx(cosine(60, 50, 70))
    assert found["mismatched"] == pytest.approx(cosine(100, 90, 30))
    assert found["texts_matched"] == pytest.approx(cosine(10))
    assert found["texts_mismatched"] == pytest.approx(cosine(30, 20))
    assert found["images_matched"] is None
    assert found["images_mismatched"] == pytest.approx(cosine(40))
    means = [np.exp(1j * a).mean() for a in angles.values()]
    assert found["gap"] == pytest.approx(abs(means[0] - means[1]))


def test_one_space_has_no_gap_and_shapes_that_differ_are_refused() -> None:
    vectors = np.eye(3)
    found = alignment(vectors, vectors, np.eye(3, dtype=bool))
    assert (found["gap"], found["matched"], found["mismatched"]) == (0, 1, 0)
    with pytest.raises(ValueError, match=r"found \[3, 3\], \[2, 3\] and \[3, 3\]"):
        alignment(vectors, vectors[:2], np.eye(3, dtype=bool))
