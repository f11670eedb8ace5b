"""Training losses; the task losses are averaged over the Matryoshka widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from metrics import Rows, max_sim, truncate

_SCALE = 20.0


def info_nce(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """Return the in-batch contrastive loss, of queries to passages and back.

    Args:
        queries: float32 [pairs, width], rows of length 1.
        passages: float32 [pairs, width], rows of length 1; a row belongs to the same row.
    """
    return _contrast(_SCALE * queries @ passages.T)


def _contrast(scores: torch.Tensor) -> torch.Tensor:
    target = torch.arange(len(scores))
    entropy = torch.nn.functional.cross_entropy
    return 0.75 * entropy(scores, target) + 0.25 * entropy(scores.T, target)


def cosent(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the CoSENT loss: pairs with a higher score should have a higher cosine.

    Args:
        first: float32 [pairs, width], rows of length 1.
        second: float32 [pairs, width], rows of length 1.
        scores: float32 [pairs].
    """
    return cosent_of((first * second).sum(-1), scores)


def cosent_of(cosines: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the CoSENT loss of cosines.

    Args:
        cosines: float32 [pairs].
        scores: float32 [pairs].
    """
    cosines = _SCALE * cosines
    gaps = cosines.unsqueeze(0) - cosines.unsqueeze(1)
    wrong = gaps[scores.unsqueeze(1) > scores.unsqueeze(0) + 0.05]
    return torch.logsumexp(torch.cat([torch.zeros(1), wrong]), dim=0)


def late_info_nce(queries: Rows, passages: Rows) -> torch.Tensor:
    """Return the in-batch contrastive loss of late interaction (MaxSim, a mean over the tokens).

    Args:
        queries: float32 [tokens, width] of each query, rows of length 1.
        passages: float32 [tokens, width] of each passage, rows of length 1.
    """
    return _contrast(_SCALE * max_sim(queries, passages))


def late_cosent(first: Rows, second: Rows, scores: torch.Tensor) -> torch.Tensor:
    """Return the CoSENT loss of late interaction, the mean of both directions.

    Args:
        first: float32 [tokens, width] of each text, rows of length 1.
        second: float32 [tokens, width] of each text, rows of length 1.
        scores: float32 [pairs].
    """
    forth, back = max_sim(first, second).diagonal(), max_sim(second, first).diagonal()
    return cosent_of(0.5 * (forth + back), scores)


def over_widths(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    first: torch.Tensor,
    second: torch.Tensor,
    widths: Sequence[int],
) -> torch.Tensor:
    """Return the mean of a loss over truncated vectors (Matryoshka).

    Args:
        loss: Takes two float32 [pairs, width].
        first: float32 [pairs, dim].
        second: float32 [pairs, dim].
        widths: Widths that the vectors are truncated to.
    """
    parts = [loss(truncate(first, width), truncate(second, width)) for width in widths]
    return torch.stack(parts).mean()


def drift(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return how far vectors and their mutual cosines moved from the bare backbone's.

    Args:
        student: float32 [texts, dim], rows of length 1, with the adapter.
        teacher: float32 [texts, dim], rows of length 1, without it.
    """
    moved = (student - teacher).square().sum(-1).mean()
    cosines = (student @ student.T - teacher @ teacher.T).square().mean()
    return moved + 10.0 * cosines
