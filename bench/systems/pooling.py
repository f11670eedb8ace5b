"""From the hidden states of tokens to one vector a text, by sentence-transformers' rules."""

from __future__ import annotations

import torch

from embedge.bench.systems.source import Source

__all__ = ["pool"]


def pool(hidden: torch.Tensor, mask: torch.Tensor, source: Source) -> torch.Tensor:
    """Return the vectors that ``source`` makes of the hidden states.

    Args:
        hidden: ``[batch, tokens, width]``, any float type; the sums are made in float32.
        mask: int64 ``[batch, tokens]``, right-padded, at least one token a row.
        source: its pooling, dense layers and normalization.

    Returns:
        float32 ``[batch, dim]``.
    """
    hidden = hidden.float()
    if source.pooling == "cls":
        vectors = hidden[:, 0]
    elif source.pooling == "lasttoken":
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    else:
        weights = mask.unsqueeze(-1).float()
        vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    for dense in source.dense:
        vectors = dense(vectors)
    return torch.nn.functional.normalize(vectors, dim=-1) if source.normalize else vectors
