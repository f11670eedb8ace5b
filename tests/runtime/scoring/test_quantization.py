"""Output formats beside sentence-transformers' own function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedge import EmbedgeValueError, dequantize_embeddings, quantize_embeddings, ranges_of
from embedge.runtime.scoring.quantization import OUTPUT_FORMATS
from embedge.runtime.scoring.similarity import similarity

Array = NDArray[Any]
SHARED = [name for name in OUTPUT_FORMATS if name != "float16"]  # with sentence-transformers


@pytest.fixture(scope="module")
def vectors() -> Array:
    values = np.random.default_rng(3).standard_normal((40, 21)).astype(np.float32)
    values[0, 3] = 0
    values[:, 5] = 0.25  # a dimension whose range is a point
    return values


@pytest.fixture(scope="module")
def ranges(vectors: Array) -> Array:
    narrow = np.stack([np.quantile(vectors, q, axis=0) for q in (0.1, 0.9)])
    return narrow.astype(np.float32)  # a fifth of the values lie outside


@pytest.mark.slow  # imports torch
@pytest.mark.parametrize("name", SHARED)
def test_codes_are_those_of_sentence_transformers(vectors: Array, ranges: Array, name: Any) -> None:
    theirs = pytest.importorskip("sentence_transformers.util.quantization")
    expected = theirs.quantize_embeddings(vectors, name, ranges=ranges)
    ours = quantize_embeddings(vectors, name, ranges=ranges)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


def test_what_lies_outside_the_ranges_is_clipped_and_does_not_wrap() -> None:
    ranges = [[-1.0, -1.0], [1.0, 1.0]]
    assert quantize_embeddings(np.array([[-9, 9]], np.float32), "int8", ranges).tolist() == [
        [-128, 127]
    ]
    assert quantize_embeddings(np.array([[-9, 9]], np.float32), "uint8", ranges).tolist() == [
        [0, 255]
    ]
    with pytest.raises(EmbedgeValueError, match="up to 65504, found 1e"):
        quantize_embeddings(np.array([-1e30, 1.0], np.float32), "float16")


@pytest.mark.parametrize(
    ("name", "row"), [("ubinary", [0b10100000, 0b10000000]), ("binary", [32, 0])]
)
def test_bits_are_packed_from_the_left_and_filled_up(name: str, row: list[int]) -> None:
    values = np.array([[1, -1, 2, 0, -1, -1, -1, -1, 3]], np.float32)
    codes = quantize_embeddings(values, name)
    assert codes.tolist() == [row]
    back = dequantize_embeddings(codes, name, dim=9)
    assert back.tolist() == [[1, -1, 1, -1, -1, -1, -1, -1, 1]]


@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_codes_give_back_what_is_inside_to_half_a_step(vectors: Array, name: str) -> None:
    ranges = ranges_of(vectors)
    back = dequantize_embeddings(quantize_embeddings(vectors, name, ranges), name, ranges)
    half = np.ptp(ranges, axis=0) / 255 / 2
    assert (np.abs(back - vectors) <= half * 1.01 + 1e-6).all()


def test_multi_vectors_keep_their_lists(vectors: Array) -> None:
    parts = [vectors[:3], vectors[3:3], vectors[3:10]]
    ranges = ranges_of(parts)
    np.testing.assert_array_equal(ranges, [vectors[:10].min(0), vectors[:10].max(0)])
    codes = quantize_embeddings(parts, "int8", calibration_embeddings=parts)
    assert [part.shape for part in codes] == [(3, 21), (0, 21), (7, 21)]
    back = dequantize_embeddings(codes, "int8", ranges)
    np.testing.assert_allclose(back[2], parts[2], atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"precision": "int4"}, "one of float32, float16, int8, uint8, binary, ubinary"),
        ({"precision": "int8"}, "found none; pass ranges, float [2, 21]"),
        ({"precision": "int8", "ranges": [[0.0], [1.0]]}, "expected the shape [2, 21]"),
        ({"precision": "int8", "ranges": "wide"}, "expected floats [2, 21]"),
        ({"precision": "uint8", "ranges": [[1.0] * 21, [0.0] * 21]}, "the lowest in ranges[0]"),
        ({"precision": "int8", "calibration_embeddings": [[1.0]]}, "at least two vectors"),
    ],
    ids=str,
)
def test_what_makes_no_codes_is_refused(vectors: Array, call: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbedgeValueError) as caught:
        quantize_embeddings(vectors, **call)
    assert message in str(caught.value)


def test_codes_are_not_quantized_or_compared_as_if_they_were_vectors(vectors: Array) -> None:
    codes = quantize_embeddings(vectors, "binary")
    with pytest.raises(EmbedgeValueError, match="expected floats, found int8"):
        quantize_embeddings(codes, "int8", [[0.0] * 3, [1.0] * 3])
    for pair in ((codes, vectors), (vectors, codes), ([codes], [vectors])):
        with pytest.raises(EmbedgeValueError, match="dequantize_embeddings"):
            similarity(pair[0], pair[1], "cosine")
    with pytest.raises(EmbedgeValueError, match="expected uint8 of the format ubinary"):
        dequantize_embeddings(codes, "ubinary")
