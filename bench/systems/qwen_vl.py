"""What transformers 4.57 and 5 call differently in Qwen2.5-VL."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

__all__ = ["image_processor_class", "no_init_weights", "rope_positions"]


def image_processor_class() -> Any:
    """The image processor that computes in numpy; transformers 5 has that name for torchvision's."""
    try:
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil
    except ImportError:
        from transformers.models.qwen2_vl import image_processing_qwen2_vl as slow

        return slow.Qwen2VLImageProcessor
    return pil.Qwen2VLImageProcessorPil


def no_init_weights() -> AbstractContextManager[None]:
    """Transformers' context in which a model is made without values."""
    place: Any
    try:
        from transformers import initialization as place
    except ImportError:
        from transformers import modeling_utils as place
    context: AbstractContextManager[None] = place.no_init_weights()
    return context


def rope_positions(model: Any, ids: Any, grid: Any, mask: Any) -> Any:
    """Positions of text and image tokens, int64 ``[3, rows, tokens]``.

    Args:
        model: transformers' ``Qwen2_5_VLModel``.
        ids: int64 ``[rows, tokens]``.
        grid: int64 ``[images, 3]``, or ``None`` without images.
        mask: int64 ``[rows, tokens]``, 0 for padding.
    """
    import transformers

    kinds = {}
    if int(transformers.__version__.split(".")[0]) >= 5:
        kinds["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return model.get_rope_index(ids, image_grid_thw=grid, attention_mask=mask, **kinds)[0]
