"""Fidelity is 1 for the reference itself, and a vector that depends on its batch is caught."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedge.bench.measure.fidelity import batch_invariance, by_kind, fidelity

VECTORS = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)


def test_the_reference_agrees_with_itself_at_every_dimension() -> None:
    found = fidelity(VECTORS, VECTORS, [16, 4])

    assert list(found) == ["16", "4"]
    for figures in found.values():
        np.testing.assert_allclose(list(figures.values()), 1.0, atol=1e-12)  # float64 rounding


def test_damage_beyond_a_dimension_does_not_show_below_it() -> None:
    damaged = VECTORS.copy()
    damaged[:, 8:] = -damaged[:, 8:]

    found = fidelity(damaged, VECTORS, [16, 8])

    assert found["16"]["cosine_mean"] < 0.9
    assert found["8"]["cosine_min"] > 1 - 1e-12


def test_kinds_are_told_apart() -> None:
    damaged = VECTORS.copy()
    damaged[0] = -damaged[0]

    found = by_kind(damaged, VECTORS, ["odd"] + ["rest"] * 29)

    assert found["odd"]["cosine_mean"] < -0.999
    assert found["rest"] == {"texts": 29, "cosine_mean": 1.0, "cosine_min": 1.0} or (
        found["rest"]["cosine_min"] > 1 - 1e-12
    )


def test_a_vector_that_depends_on_its_batch_is_caught() -> None:
    def encode(texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        rows = [VECTORS[int(text)] for text in texts]
        shift = 0.0 if batch_size == 1 else 0.05
        return np.stack(rows) + np.float32(shift)

    found = batch_invariance(encode, [str(i) for i in range(20)])

    assert found["cosine_min"] < 0.9999
    assert 0.049 < found["max_difference"] < 0.051


def test_a_vector_that_depends_on_its_text_alone_is_not() -> None:
    def encode(texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
        return np.stack([VECTORS[int(text)] for text in texts])

    found = batch_invariance(encode, [str(i) for i in range(20)])

    assert found["max_difference"] == 0.0
    assert found["cosine_min"] > 1 - 1e-12
