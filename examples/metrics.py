"""Late interaction, nDCG@10, Spearman's correlation and paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

Floats = NDArray[np.float64]
Rows = Sequence[torch.Tensor]


def truncate(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the first ``dim`` columns, each row scaled back to length 1.

    Args:
        vectors: float32 [texts, width].
        dim: Columns kept.

    Returns:
        float32 [texts, dim].
    """
    return torch.nn.functional.normalize(vectors[:, :dim], dim=-1)


def max_sim(queries: Rows, passages: Rows) -> torch.Tensor:
    """Return how well each passage answers each query, token by token.

    Args:
        queries: float32 [tokens, width] of each query, rows of length 1.
        passages: float32 [tokens, width] of each passage, rows of length 1.

    Returns:
        float32 [queries, passages]: the highest cosine of each query token among the passage's
        tokens, averaged over the query's tokens.
    """
    lengths = [len(query) for query in queries]
    tokens = torch.cat(list(queries))
    best = torch.stack([(tokens @ passage.T).amax(1) for passage in passages], dim=1)
    return torch.stack([rows.mean(0) for rows in best.split(lengths)])


def ndcg_at_10(scores: torch.Tensor) -> Floats:
    """Return nDCG@10 of each query; the passage of the same row is the one that is relevant.

    Args:
        scores: float32 [queries, passages], higher is better.

    Returns:
        float64 [queries].
    """
    own = scores.diagonal().unsqueeze(1)
    ranks = (scores > own).sum(1).numpy()
    return np.where(ranks < 10, 1.0 / np.log2(ranks + 2.0), 0.0)


def spearman(cosines: Floats, scores: Floats) -> float:
    """Return Spearman's correlation of two columns.

    Args:
        cosines: float64 [pairs].
        scores: float64 [pairs].
    """
    return float(spearmanr(cosines, scores).statistic)


def bootstrap_mean_difference(ours: Floats, theirs: Floats, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``ours - theirs`` over resampled queries.

    Args:
        ours: float64 [queries].
        theirs: float64 [queries], of the same queries.
        seed: Seed of the resampling.
    """
    difference = ours - theirs
    draw = np.random.default_rng(seed).integers(0, len(difference), (4000, len(difference)))
    low, high = np.percentile(difference[draw].mean(1), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_spearman_difference(
    ours: Floats, theirs: Floats, scores: Floats, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two correlations over resampled pairs.

    Args:
        ours: float64 [pairs], cosines of one model.
        theirs: float64 [pairs], cosines of the other.
        scores: float64 [pairs], the graded scores.
        seed: Seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(2000):
        rows = generator.integers(0, len(scores), len(scores))
        ranks = [rankdata(column[rows]) for column in (ours, theirs, scores)]
        correlation = np.corrcoef(np.stack(ranks))
        differences.append(correlation[0, 2] - correlation[1, 2])
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)
