"""Qwen2.5-VL's vision tower in torch: read from a checkpoint, and made for pictures of one size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedge.bench.errors import BenchError
from embedge.bench.systems.qwen_vl import vision_windows

__all__ = ["FixedGridTower", "load_tower", "page"]

_TOWER = re.compile(r"^(?:model\.)?visual\.")


class FixedGridTower(torch.nn.Module):
    """Transformers' vision tower for pictures of one size, without control flow that depends on it.

    The same modules and weights; windows, angles and the order of patches are constants, and the
    windows of a picture are one batch of the attention, the smaller ones padded and masked.

    Args:
        tower: ``Qwen2_5_VisionTransformerPretrainedModel``.
        grid: rows and columns of patches.
    """

    order: torch.Tensor
    restore: torch.Tensor
    index: torch.Tensor
    places: torch.Tensor
    mask: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, tower: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tower = tower
        size = torch.tensor([[1, *grid]])
        group = tower.spatial_merge_unit
        order, bounds, angles = vision_windows(tower, size)
        angles = angles.reshape(-1, group, tower.blocks[0].attn.head_dim // 2)
        angles = angles[order].reshape(grid[0] * grid[1], -1)
        lengths = torch.as_tensor(bounds).diff()
        lengths = lengths[lengths > 0]  # transformers repeats a bound where a window is empty
        width = int(lengths.max())
        real = torch.arange(width) < lengths[:, None]
        index = torch.zeros(len(lengths), width, dtype=torch.int64)
        index[real] = torch.arange(len(angles))
        mask = torch.where(real, 0.0, -torch.inf)[:, None, None].to(tower.dtype)
        self.even = bool(real.all())
        self.shape = (len(lengths), width)
        self.register_buffer("order", order)
        self.register_buffer("restore", order.argsort())
        self.register_buffer("index", index.reshape(-1))
        self.register_buffer("places", real.reshape(-1).nonzero()[:, 0])
        self.register_buffer("mask", mask)
        for name, values in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, torch.cat([values, values], -1)[:, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return ``[features, width]`` of patches ``[patches, values]``."""
        tower = self.tower
        count, group = len(self.cos), tower.spatial_merge_unit
        hidden = tower.patch_embed(pixels)
        hidden = hidden.reshape(count // group, group, -1)[self.order].reshape(count, -1)
        for number, block in enumerate(tower.blocks):
            whole = number in tower.fullatt_block_indexes
            hidden = hidden + self._attention(block.attn, block.norm1(hidden), whole)
            hidden = hidden + block.mlp(block.norm2(hidden))
        features: torch.Tensor = tower.merger(hidden)[self.restore]
        return features

    def _attention(self, attention: Any, states: torch.Tensor, whole: bool) -> torch.Tensor:
        count, heads = len(self.cos), attention.num_heads
        q, k, v = attention.qkv(states).reshape(count, 3, heads, -1).unbind(1)
        q, k = self._turned(q), self._turned(k)
        shape, mask = ((1, count) if whole else self.shape), None
        if not whole and not self.even:
            q, k, v = (part[self.index] for part in (q, k, v))
            mask = self.mask
        q, k, v = (part.reshape(*shape, heads, -1).transpose(1, 2) for part in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(shape[0] * shape[1], -1)
        projected: torch.Tensor = attention.proj(mixed if mask is None else mixed[self.places])
        return projected

    def _turned(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        first, second = wide.chunk(2, -1)
        turned = wide * self.cos + torch.cat([-second, first], -1) * self.sin
        return turned.to(states.dtype)


def load_tower(checkpoint: Path) -> Any:
    """Return the vision tower of a checkpoint as transformers' module, in float32.

    Args:
        checkpoint: a local folder with ``config.json`` and safetensors files, of jina-embeddings-v4
            or Qwen2.5-VL; only the tower's tensors are read.

    Raises:
        BenchError: the tower's tensors are not all there.
    """
    from safetensors import safe_open
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    settings = json.loads((checkpoint / "config.json").read_text("utf-8"))
    make: Any = Qwen2_5_VLVisionConfig  # untyped
    config = make(**settings["vision_config"])
    build: Any = modeling.Qwen2_5_VisionTransformerPretrainedModel
    tower = build._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    missing = dict(tower.named_parameters())
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for stored in tensors.keys():
                if _TOWER.match(stored):
                    name = _TOWER.sub("", stored)
                    missing.pop(name).data.copy_(tensors.get_tensor(stored))
    if missing:
        raise BenchError(
            f"{checkpoint}: expected all tensors of a vision tower, found none for "
            f"{', '.join(sorted(missing)[:5])}"
        )
    return tower.eval()


def page(width: int, height: int) -> Any:
    """Noise, about as smooth as a page."""
    from PIL import Image

    small = (max(1, height // 8), max(1, width // 8), 3)
    picture = np.random.default_rng(0).integers(0, 256, small, np.uint8)
    return Image.fromarray(picture).resize((width, height))
