"""From the hidden states of tokens to one vector a text, by sentence-transformers' rules."""

from __future__ import annotations

import torch

from embedge.bench.systems.source import Source

__all__ = ["pool"]


def pool(
    hidden: torch.Tensor, mask: torch.Tensor, source: Source, unpooled: int = 0
) -> torch.Tensor:
    """Return the vectors that ``source`` makes of the hidden states.

    Args:
        hidden: ``[batch, tokens, width]``, any float type; the sums are made in float32.
        mask: int64 ``[batch, tokens]``, right-padded, at least one token a row.
        source: its pooling, dense layers and normalization.
        unpooled: how many first tokens of each row count as padding here, a prompt's.

    Returns:
        float32 ``[batch, dim]``.
    """
    hidden = hidden.float()
    if unpooled:
        mask = mask.clone()
        mask[:, :unpooled] = 0
    vectors = torch.cat([_pool_by(mode, hidden, mask) for mode in source.pooling.split("+")], -1)
    for dense in source.dense:
        vectors = dense(vectors)
    return torch.nn.functional.normalize(vectors, dim=-1) if source.normalize else vectors


def _pool_by(mode: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    if mode == "cls":
        return hidden[rows, mask.argmax(1)]
    weights = mask.unsqueeze(-1).float()
    if mode == "lasttoken":  # zeros where no token is left
        places = torch.arange(mask.shape[1], device=mask.device)
        return (hidden * weights)[rows, (mask * places).argmax(1)]
    if mode == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).amax(1)
    if mode == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)[:, None]
    count = weights.sum(1).clamp(min=1)
    total = (hidden * weights).sum(1)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)
