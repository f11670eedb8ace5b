"""Search over bits, and again over 8-bit codes among what that found."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.arguments import check_choice, check_positive
from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.scoring.quantization import dequantize_embeddings, quantize_embeddings
from embedge.runtime.scoring.similarity import vector_similarity

__all__ = ["search_binary"]

_BLOCK_BYTES = 16 << 20  # of differing bits held at once
_BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def search_binary(
    queries: Any,
    binary: Any,
    int8: Any,
    *,
    ranges: Any,
    top_k: int = 10,
    rescore_multiplier: int = 4,
    similarity: str = "cosine",
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best documents of each query, by their bits first and then by their 8-bit codes.

    Bits are an eighth of a byte a dimension, small enough for memory, and find the candidates: ``top_k *
    rescore_multiplier`` by Hamming distance. The unquantized query's similarity to the codes of these, which may
    lie on a disk (``np.load(…, mmap_mode="r")``), gives their order. Source: Yamada et al., "Efficient Passage
    Retrieval with Hashing for Open-domain Question Answering", arXiv 2106.00882.

    Args:
        queries: floats ``[n, dim]`` or ``[dim]``.
        binary: int8 or uint8 ``[documents, ⌈dim / 8⌉]``, of the format "binary" or "ubinary".
        int8: int8 or uint8 ``[documents, dim]``, the same documents in the format "int8" or "uint8".
        ranges: float ``[2, dim]``, those of ``int8``.
        top_k: most documents of a query.
        rescore_multiplier: candidates for each of these.
        similarity: "cosine" or "dot", as the model's ``similarity_fn_name`` says; the order is the same for vectors of
            length 1.

    Returns:
        int64 ``[n, k]``, the documents' rows, the best first, and float32 ``[n, k]``, their similarities, with the
        smaller of ``top_k`` and the number of documents for ``k``.

    Raises:
        EmbedgeValueError: if shapes or types do not fit each other, or for another similarity.
    """
    check_positive("top_k", top_k)
    check_positive("rescore_multiplier", rescore_multiplier)
    check_choice("similarity", similarity, ("cosine", "dot"))
    wanted = np.asarray(queries, np.float32)
    wanted = wanted[None] if wanted.ndim == 1 else wanted
    dim = wanted.shape[-1]
    _check("binary", binary, (len(int8), -(-dim // 8)))
    _check("int8", int8, (len(binary), dim))
    bits = quantize_embeddings(wanted, "ubinary")
    flip = np.uint8(128 if binary.dtype == np.int8 else 0)  # "binary" is "ubinary" minus 128
    codes = "int8" if int8.dtype == np.int8 else "uint8"
    count = min(top_k, len(binary))
    rows = np.zeros((len(wanted), count), np.int64)
    scores = np.zeros((len(wanted), count), np.float32)
    for index, query in enumerate(wanted):
        distances = _hamming(bits[index] ^ flip, binary)
        candidates = np.sort(_smallest(distances, min(top_k * rescore_multiplier, len(binary))))
        vectors = dequantize_embeddings(np.asarray(int8[candidates]), codes, ranges)
        found = vector_similarity(query[None], vectors, similarity)[0]
        best = np.argsort(-found, kind="stable")[:count]
        rows[index], scores[index] = candidates[best], found[best]
    return rows, scores


def _hamming(query: NDArray[np.uint8], binary: NDArray[Any]) -> NDArray[np.int64]:
    """How many bits of each document differ from a query's, int64 ``[documents]``."""
    step = max(1, _BLOCK_BYTES // max(1, binary.shape[1]))
    distances = np.zeros(len(binary), np.int64)
    for start in range(0, len(binary), step):
        differing = np.asarray(binary[start : start + step]).view(np.uint8) ^ query
        # NumPy counts bits since 2.0
        counted = (
            np.bitwise_count(differing) if hasattr(np, "bitwise_count") else _BITS_SET[differing]
        )
        distances[start : start + step] = counted.sum(1, dtype=np.int64)
    return distances


def _smallest(distances: NDArray[np.int64], count: int) -> NDArray[np.intp]:
    """Where the smallest are, the first of equal ones."""
    if count >= len(distances):
        return np.arange(len(distances))
    bound = np.partition(distances, count - 1)[count - 1]
    below, equal = np.flatnonzero(distances < bound), np.flatnonzero(distances == bound)
    return np.concatenate([below, equal[: count - len(below)]])


def _check(name: str, codes: Any, shape: tuple[int, int]) -> None:
    dtype = getattr(codes, "dtype", None)
    if dtype not in (np.int8, np.uint8) or codes.shape != shape:
        found = f"{dtype} {list(codes.shape)}" if dtype is not None else type(codes).__name__
        raise EmbedgeValueError(
            f"{name}: expected int8 or uint8 {list(shape)}, found {found}; pass the same documents as encode gives "
            f'them with output_format="{name}", and queries as floats of the same model'
        )
