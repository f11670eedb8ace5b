"""How close two sets of vectors are: cosine, order of all pair similarities, shared neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

__all__ = ["cosine_rows", "pair_spearman", "top_k_overlap"]

Floats = NDArray[np.floating]


def cosine_rows(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Cosine of each row of ``a`` with the same row of ``b``.

    Args:
        a: floats ``[n, dim]``.
        b: floats ``[n, dim]``.

    Returns:
        float64 ``[n]``. Two zero rows count as equal (1), one zero row as unrelated (0).

    Raises:
        ValueError: the shapes differ.
    """
    a, b = _same_shape(a, b)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    dots = np.einsum("ij,ij->i", a, b)
    result: NDArray[np.float64] = np.where(both_zero, 1.0, dots / np.where(norms > 0, norms, 1.0))
    return result


def pair_spearman(a: Floats, b: Floats) -> float:
    """Spearman correlation of all pairwise cosines of ``a``'s rows with those of ``b``'s.

    Args:
        a: floats ``[n, dim_a]``, n ≥ 3.
        b: floats ``[n, dim_b]``.

    Raises:
        ValueError: the row counts differ, or there are fewer than three rows.
    """
    if len(a) != len(b) or len(a) < 3:
        raise ValueError(f"expected two sets of the same size ≥ 3, got {len(a)} and {len(b)}")
    upper = np.triu_indices(len(a), 1)
    return spearman(_cosines(a)[upper], _cosines(b)[upper])


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank."""
    rx, ry = rankdata(x), rankdata(y)
    rx -= rx.mean()
    ry -= ry.mean()
    scale = float(np.sqrt((rx @ rx) * (ry @ ry)))
    return float(rx @ ry) / scale if scale > 0 else float("nan")


def top_k_overlap(a: Floats, b: Floats, k: int = 10) -> float:
    """Mean share of each row's ``k`` nearest other rows (by cosine) that ``a`` and ``b`` agree on.

    Raises:
        ValueError: the row counts differ, or there are not more than ``k`` rows.
    """
    if len(a) != len(b) or len(a) <= k:
        raise ValueError(f"expected two sets of the same size > k={k}, got {len(a)} and {len(b)}")
    near_a, near_b = _neighbours(a, k), _neighbours(b, k)
    return float(np.mean([len(set(x) & set(y)) / k for x, y in zip(near_a, near_b, strict=True)]))


def _same_shape(a: Floats, b: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.shape != b.shape:
        raise ValueError(f"expected two arrays of one shape, got {a.shape} and {b.shape}")
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


def _cosines(a: Floats) -> NDArray[np.float64]:
    unit = np.asarray(a, np.float64)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    unit = unit / np.where(norms > 0, norms, 1.0)
    result: NDArray[np.float64] = unit @ unit.T
    return result


def _neighbours(a: Floats, k: int) -> NDArray[np.intp]:
    cosines = _cosines(a)
    np.fill_diagonal(cosines, -np.inf)
    result: NDArray[np.intp] = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return result
