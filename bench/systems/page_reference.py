"""The yardstick of models that embed page images: Qwen2.5-VL in torch, single and multi-vectors.

Source: Günther et al., "jina-embeddings-v4", arXiv 2506.18902, and its published code: an image stands in a user's
turn that asks to describe it, and the tokens from vision_start to vision_end are pooled; multi-vectors are of every
token.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from embedge.bench.documents import Document
from embedge.bench.systems.backbone import Inner
from embedge.bench.systems.pooling import pool
from embedge.bench.systems.qwen_vl import image_processor_class, rope_positions
from embedge.bench.systems.reference import Reference
from embedge.bench.systems.source import Source

__all__ = ["PageReference"]

Vectors = NDArray[np.float32]
_BEFORE = "<|im_start|>user\n<|vision_start|>"
_PAD = "<|image_pad|>"
_AFTER = "<|vision_end|>Describe the image.<|im_end|>\n"


class PageReference(Reference):
    """A :class:`Reference` that takes images too."""

    def __init__(
        self,
        source: str | Path | Source,
        adapter: str | Path | None = None,
        dtype: str = "float32",
        pooling: str | None = None,
        threads: int | None = None,
        *,
        merged: bool = False,
        device: str = "cpu",
        task: str | None = None,
    ) -> None:
        """Load the model; arguments and errors are those of :class:`Reference`."""
        super().__init__(source, adapter, dtype, pooling, threads, device=device, task=task)
        if merged and adapter is not None:
            self._model = self._model.merge_and_unload()
        inner = self._model.get_base_model() if hasattr(self._model, "peft_config") else self._model
        self._core = inner.model if isinstance(inner, Inner) else inner
        self._head = getattr(inner, "multi_vector_projector", None)
        self._processor = image_processor_class().from_pretrained(self.source.transformer)

    def encode_images(self, images: Sequence[Document], max_pixels: int | None = None) -> Vectors:
        """Return one vector an image, float32 ``[n, dim]``.

        Args:
            images: bytes of image files, or paths.
            max_pixels: to which larger ones are scaled down; ``None``: as the source does.
        """
        with torch.inference_mode():
            vectors = [
                pool(states, pooled, self.source)[0].cpu().numpy()
                for states, pooled in (self._image_states(image, max_pixels) for image in images)
            ]
        return np.stack(vectors)

    def token_vectors(self, texts: Sequence[str], role: str | None = None) -> list[Vectors]:
        """Return the multi-vectors of texts, float32 ``[tokens, width]`` each."""
        prompt = self.source.prompt(role)
        found = []
        with torch.inference_mode():
            for row in self.tokens([prompt + text for text in texts]):
                ids = torch.tensor([row], device=self._device)
                output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
                found.append(self._projected(output.last_hidden_state))
        return found

    def image_token_vectors(self, images: Sequence[Document]) -> list[Vectors]:
        """Return the multi-vectors of images, float32 ``[tokens, width]`` each."""
        with torch.inference_mode():
            return [self._projected(self._image_states(image, None)[0]) for image in images]

    def token_scores(self, queries: Sequence[Vectors], pages: Sequence[Vectors]) -> Vectors:
        """Return MaxSim of each query and page, float32 ``[queries, pages]``.

        Source: Khattab and Zaharia, "ColBERT", arXiv 2004.12832.
        """
        scores = [[(query @ page.T).max(axis=1).sum() for page in pages] for query in queries]
        return np.array(scores, np.float32)

    def page_tokens(self, image: Document, max_pixels: int | None = None) -> int:
        """Return how many tokens an image is, those of the turn it stands in included."""
        return len(self._image_tokens(self._patches(image, max_pixels)["image_grid_thw"]))

    def _patches(self, image: Document, max_pixels: int | None) -> Any:
        size = dict(self._processor.size)
        if max_pixels is not None:
            size |= {"longest_edge": max_pixels}
            size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
        return self._processor([_picture(image)], return_tensors="pt", size=size)

    def _image_tokens(self, grid: torch.Tensor) -> list[int]:
        count = int(grid.prod()) // self._processor.merge_size**2
        return self.tokens([_BEFORE + _PAD * count + _AFTER])[0]

    def _image_states(
        self, image: Document, max_pixels: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states ``[1, tokens, width]`` and the mask of what is pooled, int64 ``[1, tokens]``."""
        patches = self._patches(image, max_pixels)
        grid = patches["image_grid_thw"].to(self._device)
        row = self._image_tokens(grid)
        ids = torch.tensor([row], device=self._device)
        mask = torch.ones_like(ids)
        dtype = next(self._core.parameters()).dtype
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=rope_positions(self._core, ids, grid, mask),
            pixel_values=patches["pixel_values"].to(self._device, dtype),
            image_grid_thw=grid,
        )
        start, end = (
            int((ids[0] == token).int().argmax())
            for token in (
                self._core.config.vision_start_token_id,
                self._core.config.vision_end_token_id,
            )
        )
        pooled = torch.zeros_like(ids)
        pooled[:, start : end + 1] = 1
        return output.last_hidden_state, pooled

    def _projected(self, states: torch.Tensor) -> Vectors:
        head: Any = self._head
        vectors = torch.nn.functional.normalize(head(states[0]).float(), dim=-1)
        found: Vectors = vectors.cpu().numpy()
        return found


def _picture(image: Document) -> Image.Image:
    """Return an image upright, in RGB."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")
