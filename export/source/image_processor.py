"""What a bundle says about images: how they become patches, and the tokens around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.checkpoint import Checkpoint
from embedge.export.source.json_files import read_json_object, read_optional
from embedge.export.source.tokenizer import BundleTokenizer

_FILE = "preprocessor_config.json"
_JOINT_FILE = "processor_config.json"  # of transformers 5
# What encode_image of jina-embeddings-v4 puts around an image, its only training prompt.
_PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"
)
_PROCESSORS = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
)
_SIZES = ("patch_size", "temporal_patch_size", "merge_size")
_SWITCHES = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize")


def image_settings(
    checkpoint: Checkpoint, tower: Mapping[str, Any], tokenizer: BundleTokenizer
) -> dict[str, Any]:
    """The manifest's ``model.image``.

    Args:
        checkpoint: with ``preprocessor_config.json`` beside its config.
        tower: what the manifest says of the vision tower, its patch, temporal and merge sizes among it.
        tokenizer: gives the ids of the prompt around an image.

    Raises:
        CheckpointError: the preprocessing is not Qwen2-VL's, or the tokenizer lacks its tokens.
    """
    file = checkpoint.transformer_path / _FILE
    joint = checkpoint.transformer_path / _JOINT_FILE
    joined = read_optional(joint).get("image_processor")
    if file.is_file():
        values = read_json_object(file)
    elif isinstance(joined, dict):
        file, values = joint, joined
    else:
        raise CheckpointError(
            f"{file}: no such file; it says how images become patches. Restore it from the source, or "
            "export without images: modality='text' (--modality text)"
        )

    def refuse(key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: {key} is {values.get(key)!r}, expected {expected}; other preprocessing is not "
            "implemented. Export without images: modality='text' (--modality text)"
        )

    if values.get("image_processor_type") not in _PROCESSORS:
        raise refuse("image_processor_type", " or ".join(_PROCESSORS))
    for key in _SWITCHES:
        if values.get(key, True) is not True:
            raise refuse(key, "true")
    size = values.get("size") or {}
    sizes = {
        "min_pixels": values.get("min_pixels", size.get("shortest_edge", 56 * 56)),
        "max_pixels": values.get("max_pixels", size.get("longest_edge", 28 * 28 * 1280)),
    }
    for key in _SIZES:
        if values.get(key, tower[key]) != tower[key]:
            raise refuse(key, f"{tower[key]}, as vision_config says")
    if values.get("resample", 3) != 3:
        raise refuse("resample", "3 (bicubic)")
    ids = tokenizer.encode([_PROMPT], 1 << 20)[0]
    image_token = checkpoint.config.get("image_token_id")
    start, end = (checkpoint.config.get(f"vision_{n}_token_id") for n in ("start", "end"))
    place = ids.index(image_token) if image_token in ids else 0
    if not place or ids[place - 1 : place + 2] != [start, image_token, end]:
        raise CheckpointError(
            f"{checkpoint.transformer_path}/tokenizer.json: expected the image prompt to become the "
            f"tokens {start}, {image_token}, {end} of config.json among others, found {ids}; restore "
            "the tokenizer from the source"
        )
    return {
        **tower,
        **sizes,
        "image_mean": values["image_mean"],
        "image_std": values["image_std"],
        "rescale_factor": values.get("rescale_factor", 1 / 255),
        "resample": 3,
        "before_ids": ids[:place],
        "image_token_id": image_token,
        "after_ids": ids[place + 1 :],
        "pooled_before": 1,
        "pooled_after": 1,
    }
