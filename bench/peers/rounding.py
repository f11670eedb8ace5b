"""Yardsticks, not rivals: torch fp32 with the weights of its Linears rounded to nearest, nothing else.

``int8``: symmetric, a scale for every output channel, which is what "weight-only int8" usually means.
``int4``: a scale and a zero point for every 32 neighbouring inputs, from their smallest and largest value.
Activations and tables stay float32, so that the figures are those of the weights alone. Neither is a way
to run a model: sizes and times are those of torch fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.hidden_state import HiddenStateSystem
from embedge.bench.peers.torch import runs_of

__all__ = ["int4_weights", "int8_weights", "rounded_blocks", "rounded_rows"]

_BLOCK = 32


def _rounded(
    name: str, rounding: Callable[[torch.Tensor], torch.Tensor], context: PeerContext
) -> HiddenStateSystem:
    """Return the merged model with every Linear's weight rounded."""
    model = copy.deepcopy(context.merged.backbone)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounding(module.weight))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return HiddenStateSystem(name, runs_of(model), context, size)


def rounded_rows(weight: torch.Tensor) -> torch.Tensor:
    """float32 ``[out, in]`` on 255 levels a row, symmetric."""
    step = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(weight / step) * step


def rounded_blocks(weight: torch.Tensor) -> torch.Tensor:
    """float32 ``[out, in]`` on 16 levels for every 32 neighbours of a row, a shorter rest included."""
    parts = []
    for start in range(0, weight.shape[1], _BLOCK):
        part = weight[:, start : start + _BLOCK]
        low = part.amin(dim=1, keepdim=True).clamp_max(0)
        high = part.amax(dim=1, keepdim=True).clamp_min(0)
        step = ((high - low) / 15).clamp_min(1e-12)
        zero = torch.round(-low / step)
        parts.append((torch.clamp(torch.round(part / step) + zero, 0, 15) - zero) * step)
    return torch.cat(parts, dim=1)


def int8_weights(context: PeerContext) -> HiddenStateSystem:
    """Return torch fp32 with Linears on 255 levels a row."""
    return _rounded("int8 weights alone", rounded_rows, context)


def int4_weights(context: PeerContext) -> HiddenStateSystem:
    """Return torch fp32 with Linears on 16 levels for every 32 inputs."""
    return _rounded("int4 weights alone, blocks of 32", rounded_blocks, context)
