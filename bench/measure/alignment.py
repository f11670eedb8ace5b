"""How texts and images lie in one space: cosines of pairs within and across modalities, and the gap between them.

Source: Radford et al., "CLIP", arXiv 2103.00020, of matched pairs; Liang et al., "Mind the Gap", arXiv 2203.02053,
of the gap: the distance of the two means of vectors of length 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["alignment"]

Floats = NDArray[np.floating]


def alignment(texts: Floats, images: Floats, matches: NDArray[np.bool_]) -> dict[str, float | None]:
    """Return the mean cosines of matched and mismatched pairs, and the gap.

    Two texts match where an image matches both, and two images where a text does.

    Args:
        texts: ``[texts, dim]``, of any length above 0.
        images: ``[images, dim]``.
        matches: bool ``[texts, images]``, which belong together.

    Returns:
        ``matched`` and ``mismatched`` pairs across modalities; ``texts_matched``, ``texts_mismatched``,
        ``images_matched`` and ``images_mismatched`` of different ones within one; ``None`` where there is no such
        pair. ``gap``: the Euclidean distance of the two means, 0…2.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if matches.shape != (len(texts), len(images)) or texts.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"expected [texts, dim], [images, dim] and [texts, images], found {list(texts.shape)}, "
            f"{list(images.shape)} and {list(matches.shape)}"
        )
    one, other = _unit(texts), _unit(images)
    found = _means("", one @ other.T, matches, np.ones_like(matches))
    counts = matches.astype(np.int64)
    for name, vectors, shared in (
        ("texts_", one, counts @ counts.T),
        ("images_", other, counts.T @ counts),
    ):
        different = ~np.eye(len(vectors), dtype=bool)
        found |= _means(name, vectors @ vectors.T, shared > 0, different)
    return found | {"gap": float(np.linalg.norm(one.mean(axis=0) - other.mean(axis=0)))}


def _means(
    name: str, cosines: Floats, matched: NDArray[np.bool_], counted: NDArray[np.bool_]
) -> dict[str, float | None]:
    kinds = {"matched": matched & counted, "mismatched": ~matched & counted}
    return {
        f"{name}{kind}": float(cosines[pairs].mean()) if pairs.any() else None
        for kind, pairs in kinds.items()
    }


def _unit(vectors: Floats) -> NDArray[np.float64]:
    wide = np.asarray(vectors, np.float64)
    found: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return found
