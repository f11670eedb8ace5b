"""Search by bits with 8-bit codes, beside the same in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge import EmbedgeValueError, quantize_embeddings, ranges_of, search_binary
from embedge.runtime.scoring import rescoring

Array = NDArray[Any]
DIM = 52


@pytest.fixture(scope="module")
def documents() -> Array:
    return np.random.default_rng(5).standard_normal((300, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def queries(documents: Array) -> Array:
    noise = np.random.default_rng(6).standard_normal((20, DIM)).astype(np.float32)
    return documents[:20] + noise * 0.7


@pytest.mark.parametrize(("bits", "codes"), [("binary", "int8"), ("ubinary", "uint8")])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("counts_bits", [True, False])
def test_candidates_by_bits_get_their_order_by_codes(
    documents: Array,
    queries: Array,
    bits: str,
    codes: str,
    similarity: str,
    counts_bits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rescoring, "_BLOCK_BYTES", 1000)
    if not counts_bits:  # as with NumPy 1
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    ranges = ranges_of(documents)
    rows, scores = search_binary(
        queries,
        quantize_embeddings(documents, bits),
        quantize_embeddings(documents, codes, ranges),
        ranges=ranges,
        top_k=5,
        rescore_multiplier=4,
        similarity=similarity,
    )
    assert rows.shape == scores.shape == (20, 5)
    differing = ((queries[:, None] > 0) != (documents[None] > 0)).sum(-1)
    step = np.ptp(ranges, axis=0) / 255
    for query, found, of, far in zip(queries, rows, scores, differing, strict=True):
        candidates = np.argsort(far, kind="stable")[:20]
        bound = (np.abs(query) * step / 2).sum() * 1.01 + 1e-4
        every = documents @ query
        if similarity == "cosine":
            lengths = np.linalg.norm(documents, axis=1) * np.linalg.norm(query)
            every, bound = every / lengths, 2 * bound / lengths.min()
        exact = every[candidates]
        assert set(found) <= set(candidates)
        assert (np.diff(of) <= 0).all()
        np.testing.assert_allclose(of, every[found], atol=bound)
        assert exact[~np.isin(candidates, found)].max() <= of[-1] + bound


def test_noisy_copies_find_their_documents(documents: Array, queries: Array) -> None:
    ranges = ranges_of(documents)
    codes = [quantize_embeddings(documents, name, ranges) for name in ("ubinary", "int8")]
    rows, _ = search_binary(queries, *codes, ranges=ranges, top_k=1)
    assert (rows[:, 0] == np.arange(20)).mean() >= 0.9
    [all_rows], [scores] = search_binary(queries[0], *codes, ranges=ranges, top_k=1000)
    assert sorted(all_rows) == list(range(300))
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"binary": np.zeros((300, 6), np.uint8)}, "binary: expected int8 or uint8 [300, 7]"),
        ({"int8": np.zeros((300, DIM), np.float32)}, "int8: expected int8 or uint8 [300, 52]"),
        ({"int8": np.zeros((299, DIM), np.int8)}, "expected int8 or uint8 [299, 7]"),
        ({"top_k": 0}, "top_k is 0"),
        ({"ranges": None}, "found none"),
        ({"similarity": "maxsim"}, "one of cosine, dot"),
    ],
    ids=["narrow", "floats", "fewer", "none", "ranges", "similarity"],
)
def test_what_does_not_fit_is_refused(queries: Array, change: dict[str, Any], message: str) -> None:
    call = {
        "binary": np.zeros((300, 7), np.uint8),
        "int8": np.zeros((300, DIM), np.int8),
        "ranges": [[0.0] * DIM, [1.0] * DIM],
    }
    with pytest.raises(EmbedgeValueError) as caught:
        search_binary(queries, **{**call, **change})
    assert message in str(caught.value)
