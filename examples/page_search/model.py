"""The model in torch: transformers' Qwen2.5-VL with v4's multi-vector head, made small.

Its attention over images is replaced while it trains: transformers calls it window by window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from jina_v4_layout import Size, text_config, vision_config
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from embedge.bench.systems.qwen_vl import rope_positions, vision_features
from page_search.pages import HEIGHT, WIDTH

HEADS = 3
GRID = (HEIGHT // 14, WIDTH // 14)  # patches
FEATURES = GRID[0] * GRID[1] // 4
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def small_size(tokens: int, merges: int) -> Size:
    """Return the widths and depths: 2.5 million parameters.

    Args:
        tokens: rows of the embedding table.
        merges: of the tokenizer.
    """
    return Size(
        hidden=192,
        intermediate=384,
        layers=3,
        heads=HEADS,
        kv_heads=1,
        mrope_section=(8, 12, 12),
        rope_theta=1000.0,
        vision_hidden=128,
        vision_intermediate=256,
        vision_depth=4,
        vision_heads=4,
        full_attention_blocks=(1, 3),
        rank=4,
        matryoshka_dims=(32, 64, 128, 192),
        outliers=0,
        outlier_sizes=(1.0, 1.0),
        adapter_strength=0.0,
        vocabulary=tokens,
        merges=merges,
        projector=64,
    )


@dataclass
class Encoded:
    """Vectors of a batch, all of length 1.

    Attributes:
        single: float32 ``[rows, hidden]``.
        multi: float32 ``[rows, tokens, projector]``.
        mask: int64 ``[rows, tokens]``, 0 for padding.
    """

    single: torch.Tensor
    multi: torch.Tensor
    mask: torch.Tensor


class PageModel(torch.nn.Module):
    """Qwen2.5-VL and the multi-vector projector, with the names that published adapters use.

    Args:
        size: widths, depths and the ids of special tokens.
        image_ids: ids of the prompt of a page.
    """

    def __init__(self, size: Size, image_ids: Sequence[int]) -> None:
        super().__init__()
        text = text_config(size) | {"vocab_size": size.vocabulary, "sliding_window": None}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "torch_dtype": "float32"},
            vision_config=vision_config(size),
            **size.tokens(),
        )
        self.model = transformers.Qwen2_5_VLModel._from_config(config, attn_implementation="sdpa")
        self.multi_vector_projector = torch.nn.Linear(size.hidden, size.projector)
        ids = torch.tensor(image_ids)
        self.image_ids = ids
        start, end = size.tokens()["vision_start_token_id"], size.tokens()["vision_end_token_id"]
        first, last = int((ids == start).nonzero()), int((ids == end).nonzero())
        places = torch.arange(len(ids))
        pooled = (places >= first) & (places <= last)
        self.image_pooled = pooled
        grid = torch.tensor([[1, *GRID]])
        positions = rope_positions(self.model, ids[None], grid, torch.ones_like(ids)[None])
        self.image_positions: torch.Tensor = positions
        self.is_feature = ids == size.tokens()["image_token_id"]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the tower's features of pages, ``[pages, FEATURES, hidden]``.

        Args:
            pixels: float32 ``[pages, patches, 1176]``, as ``patches`` gives them.
        """
        grids = torch.tensor([[1, *GRID]] * len(pixels))
        output: torch.Tensor = vision_features(self.model.visual, pixels.flatten(0, 1), grids)
        return output.reshape(len(pixels), FEATURES, -1)

    def pages(self, features: torch.Tensor) -> Encoded:
        """Return the vectors of pages of these features."""
        count = len(features)
        inputs = self.model.language_model.embed_tokens(self.image_ids).expand(count, -1, -1)
        inputs = inputs.clone()
        inputs[:, self.is_feature] = features
        positions = self.image_positions.expand(3, count, -1)
        mask = torch.ones(inputs.shape[:2], dtype=torch.int64)
        pooled = self.image_pooled.expand(count, -1)
        return self._encoded(inputs, mask, positions, pooled)

    def texts(self, rows: Sequence[Sequence[int]]) -> Encoded:
        """Return the vectors of texts of these ids."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        positions = torch.arange(width).expand(3, len(rows), -1)
        inputs = self.model.language_model.embed_tokens(ids)
        return self._encoded(inputs, mask, positions, mask)

    def _encoded(
        self,
        inputs: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        pooled: torch.Tensor,
    ) -> Encoded:
        states = self.model.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        weights = pooled[..., None].float()
        single = (states * weights).sum(1) / weights.sum(1)
        multi = functional.normalize(self.multi_vector_projector(states), dim=-1)
        return Encoded(functional.normalize(single, dim=-1), multi * mask[..., None], mask)


def patches(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return pages as the tower takes them, float32 ``[pages, patches, 1176]``.

    The same numbers as transformers' image processor gives, for images that need no resizing.
    """
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    pixels = (pixels - MEAN) / STD
    count, (rows, columns) = len(images), GRID
    parts = pixels.reshape(count, rows // 2, 2, 14, columns // 2, 2, 14, 3)
    parts = parts.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # group, patch in it, channel, pixels
    twice: NDArray[np.float32] = np.repeat(parts[:, :, :, :, :, :, None], 2, axis=6)
    return torch.from_numpy(twice.reshape(count, rows * columns, -1))


def train_faster() -> None:
    """Let transformers' tower take all pages of a batch in one call, each image having two same frames.

    transformers' own attends window by window, and convolves both frames. The results are the same.
    """
    qwen.Qwen2_5_VLVisionAttention.forward = _attention
    qwen.Qwen2_5_VisionPatchEmbed.forward = _embedded


def _embedded(self: Any, pixels: torch.Tensor) -> torch.Tensor:
    frame = pixels.reshape(len(pixels), 3, 2, -1)[:, :, 0].flatten(1)
    return functional.linear(frame, self.proj.weight.sum(2).flatten(1))


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    total, each = len(hidden_states), GRID[0] * GRID[1]
    qkv = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1)
    query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)
    query, key = qwen.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    split = (total // each, each, self.num_heads, -1)
    query, key, value = (part.reshape(split).transpose(1, 2) for part in (query, key, value))
    window = torch.bucketize(torch.arange(each), cu_seqlens[1:], right=True)
    mask = window[:, None] == window[None]
    found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    projected: torch.Tensor = self.proj(found.transpose(1, 2).reshape(total, -1))
    return projected
