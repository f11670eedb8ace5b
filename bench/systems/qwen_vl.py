"""What transformers 4.57 and 5 call differently in Qwen2.5-VL."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = [
    "image_processor_class",
    "no_init_weights",
    "rope_positions",
    "vision_features",
    "vision_windows",
]


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
    name = "initialization" if find_spec("transformers.initialization") else "modeling_utils"
    context: AbstractContextManager[None] = import_module(f"transformers.{name}").no_init_weights()
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


def vision_windows(tower: Any, grids: Any) -> tuple[Any, Any, Any]:
    """The vision tower's order of windows, their bounds in it, and the rotary angles by patch.

    Args:
        tower: ``Qwen2_5_VisionTransformerPretrainedModel``.
        grids: int64 ``[images, 3]``.
    """
    if hasattr(tower, "get_window_index"):
        return *tower.get_window_index(grids), tower.rot_pos_emb(grids)
    from transformers import vision_utils

    merge, patch = tower.spatial_merge_size, tower.patch_size
    order, bounds = vision_utils.get_vision_window_index(
        grids, spatial_merge_size=merge, window_size=tower.window_size, patch_size=patch
    )
    positions = vision_utils.get_vision_position_ids(grids, merge)
    return order, bounds, (positions[..., None] * tower.rotary_pos_emb.inv_freq).flatten(1)


def vision_features(tower: Any, pixels: Any, grids: Any) -> Any:
    """The vision tower's features ``[features, width]`` of patches ``[patches, values]``."""
    output = tower(pixels, grids)
    return getattr(output, "pooler_output", output)  # transformers 5 gives states beside them
