"""Similarity of vectors or of multi-vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.errors import EmbedgeValueError
from embedge.runtime.scoring.late_interaction import max_sim
from embedge.runtime.scoring.quantization import is_code

__all__ = ["normalized", "similarity", "similarity_pairwise", "vector_similarity"]

Vectors = NDArray[np.float32]
TOKEN_KINDS = ("maxsim", "meanmaxsim")  # of late interaction
_SMALLEST = 1e-15  # of norms whose squares float32 holds with all their digits


def normalized(vectors: Vectors) -> Vectors:
    """Vectors ``[..., dim]`` with L2 norm 1; zero vectors stay zero, NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        beyond = ~((norms > _SMALLEST) & (norms < np.inf))  # their squares leave float32's range
        if beyond.any():
            largest = np.abs(vectors).max(-1, keepdims=True, initial=0.0)
            scaled = np.divide(vectors, largest, out=np.zeros_like(vectors), where=largest != 0)
            vectors = np.where(beyond, scaled, vectors)
            norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        unit = np.zeros_like(vectors)
        np.divide(vectors, norms, out=unit, where=norms != 0)
        return unit


def similarity(a: Any, b: Any, kind: str) -> Vectors:
    """Similarity of each of ``a`` to each of ``b``, float32 ``[len(a), len(b)]``.

    Args:
        a: vectors ``[n, dim]``, one vector ``[dim]``, or a list of multi-vectors ``[tokens, dim]``,
            then scored by late interaction.
        b: like ``a``.
        kind: "cosine" or "dot", for single vectors; of late interaction "maxsim", or "meanmaxsim", which is
            divided by the tokens of ``a``. An array ``[tokens, dim]`` is one multi-vector then.

    Raises:
        EmbedgeValueError: if the two differ in kind or in dimension.
    """
    multi = _both_multi_vectors(a, b, kind)
    if multi is None:
        return vector_similarity(_matrix(a, "a"), _matrix(b, "b"), kind)
    return max_sim(*multi) / _divisors(multi[0], kind)[:, None]


def similarity_pairwise(a: Any, b: Any, kind: str) -> Vectors:
    """Similarity of each of ``a`` to that of ``b`` in the same place, float32 ``[n]``.

    Args:
        a: as for :func:`similarity`.
        b: like ``a``, and as many.
        kind: as for :func:`similarity`.

    Raises:
        EmbedgeValueError: if the two differ in kind, number or dimension.
    """
    multi = _both_multi_vectors(a, b, kind)
    if multi is not None:
        _check_pairs(*map(len, multi))
        pairs = [max_sim([one], [other])[0, 0] for one, other in zip(*multi, strict=True)]
        return np.array(pairs, np.float32) / _divisors(multi[0], kind)
    one, other = _matrix(a, "a"), _matrix(b, "b")
    _check_pairs(len(one), len(other))
    _check_dimensions(one, other)
    if kind == "cosine":
        one, other = normalized(one), normalized(other)
    products: Vectors = np.einsum("nd,nd->n", one, other)
    return products


def _check_pairs(a: int, b: int) -> None:
    if a != b:
        raise EmbedgeValueError(
            f"vectors in pairs: found {a} and {b}; pass as many of one as of the other, or take "
            "similarity for all with all"
        )


def _divisors(queries: list[Vectors], kind: str) -> Vectors:
    """By what the scores of some queries are divided, float32 ``[queries]``."""
    mean = kind == "meanmaxsim"
    return np.array([max(1, len(query)) if mean else 1 for query in queries], np.float32)


def _both_multi_vectors(a: Any, b: Any, kind: str) -> tuple[list[Vectors], list[Vectors]] | None:
    """The parts of two lists of multi-vectors, ``None`` for two of single vectors.

    Raises:
        EmbedgeValueError: for one of each.
    """
    _check_no_codes(a, b)
    if kind in TOKEN_KINDS:
        a, b = ([x] if isinstance(x, np.ndarray) and x.ndim == 2 else x for x in (a, b))
    multi_a, multi_b = _multi_vectors(a), _multi_vectors(b)
    if multi_a is not None and multi_b is not None:
        return multi_a, multi_b
    empty = [x is not None and not x for x in (multi_a, multi_b)]
    if (multi_a is None) != (multi_b is None) and not any(empty):
        raise EmbedgeValueError(
            "similarity of multi-vectors with single vectors; expected two lists of arrays "
            "[tokens, dim], or two arrays [n, dim]"
        )
    return None


def vector_similarity(a: Vectors, b: Vectors, kind: str) -> Vectors:
    """Cosine or dot product, float32 ``[n, m]``, of float32 ``[n, dim]`` and ``[m, dim]``."""
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)), np.float32)
    _check_dimensions(a, b)
    if kind == "cosine":
        a, b = normalized(a), normalized(b)
    return a @ b.T


def _check_dimensions(a: Vectors, b: Vectors) -> None:
    if a.shape[1] != b.shape[1]:
        raise EmbedgeValueError(
            f"vectors of different dimensions: {a.shape[1]} and {b.shape[1]}; encode both with the "
            "same truncate_dim"
        )


def _check_no_codes(a: Any, b: Any) -> None:
    for name, value in (("a", a), ("b", b)):
        if is_code(value):
            raise EmbedgeValueError(
                f"{name}: codes of 8 bits or of one, whose products say little without their ranges; expected floats: "
                "take dequantize_embeddings(codes, output_format, ranges), or search_binary"
            )


def _multi_vectors(value: Any) -> list[Vectors] | None:
    """The parts of a list of ``[tokens, dim]`` arrays, ``None`` for anything else."""
    if isinstance(value, np.ndarray):
        return list(value.astype(np.float32, copy=False)) if value.ndim == 3 else None
    if not isinstance(value, (list, tuple)):
        return None
    if all(np.ndim(part) == 2 for part in value):
        return [np.asarray(part, np.float32) for part in value]
    return None


def _matrix(value: Any, name: str) -> Vectors:
    """Vectors as float32 ``[n, dim]``."""
    try:
        matrix = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise EmbedgeValueError(
            f"{name}: not an array of vectors of one length: {error}"
        ) from error
    if matrix.ndim == 1:
        matrix = matrix.reshape(1, -1) if matrix.size else matrix.reshape(0, 0)
    if matrix.ndim != 2:
        raise EmbedgeValueError(
            f"{name}: expected an array [n, dim], found {matrix.ndim} dimensions"
        )
    return matrix
