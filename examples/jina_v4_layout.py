"""What a jina-embeddings-v4 checkpoint consists of: sizes, configuration files and tensor names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qwen_vocabulary import MERGES, added_ids

TASKS = ("retrieval", "text-matching", "code")
PROJECTOR = "multi_vector_projector"
TEXT, VISION = "model.language_model.", "model.visual."
TOKENS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
}


@dataclass(frozen=True)
class Size:
    """The widths and depths of a checkpoint, and the rank of its adapters.

    ``outliers`` to ``adapter_strength`` are of the random values: how many residual channels are
    larger than the others, how many times the smallest and the largest of them are, and how much of
    a Linear's output an adapter adds.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float
    vision_hidden: int
    vision_intermediate: int
    vision_depth: int
    vision_heads: int
    full_attention_blocks: tuple[int, ...]
    rank: int
    matryoshka_dims: tuple[int, ...]
    outliers: int
    outlier_sizes: tuple[float, float]
    adapter_strength: float
    vocabulary: int = 151936  # rows of the table; the tokenizer has 151,665 tokens
    merges: int = MERGES  # of the tokenizer
    projector: int = 128

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tokens(self) -> dict[str, int]:
        """Return the ids of special tokens that configurations name."""
        ids = added_ids(self.merges)
        return {key: ids[token] for key, token in TOKENS.items()}


FULL = Size(
    hidden=2048,
    intermediate=11008,
    layers=36,
    heads=16,
    kv_heads=2,
    mrope_section=(16, 24, 24),
    rope_theta=1000000.0,
    vision_hidden=1280,
    vision_intermediate=3420,
    vision_depth=32,
    vision_heads=16,
    full_attention_blocks=(7, 15, 23, 31),
    rank=32,
    matryoshka_dims=(128, 256, 512, 1024, 2048),
    outliers=6,
    outlier_sizes=(20.0, 100.0),
    adapter_strength=0.25,
)
TINY = Size(
    hidden=64,
    intermediate=160,
    layers=3,
    heads=4,
    kv_heads=2,
    mrope_section=(2, 3, 3),
    rope_theta=100.0,  # so that small images are turned on all three axes
    vision_hidden=64,
    vision_intermediate=84,
    vision_depth=4,
    vision_heads=4,
    full_attention_blocks=(1, 3),
    rank=4,
    matryoshka_dims=(16, 32, 64),
    outliers=2,
    outlier_sizes=(20.0, 40.0),
    adapter_strength=0.3,
)
SHORT = replace(TINY, vocabulary=2304, merges=2000)  # the tiny one with few words, read at once
SIZES = {"full": FULL, "tiny": TINY, "short": SHORT}


def text_config(size: Size) -> dict[str, Any]:
    """Return the language model's settings, those of the top level and of ``text_config`` alike."""
    section = list(size.mrope_section)
    return {
        "attention_dropout": 0.0,
        "bos_token_id": size.tokens()["bos_token_id"],
        "eos_token_id": size.tokens()["eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": section, "rope_type": "default", "type": "default"},
        "rope_theta": size.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }


def vision_config(size: Size) -> dict[str, Any]:
    """Return the vision tower's settings."""
    return {
        "depth": size.vision_depth,
        "fullatt_block_indexes": list(size.full_attention_blocks),
        "hidden_act": "silu",
        "hidden_size": size.vision_hidden,
        "in_channels": 3,
        "in_chans": 3,
        "intermediate_size": size.vision_intermediate,
        "model_type": "qwen2_5_vl",
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    }


def nested_config(size: Size) -> dict[str, Any]:
    """Return what the published configuration shares with one saved by transformers 4.52."""
    text = text_config(size)
    inner = {"model_type": "qwen2_5_vl_text", "vocab_size": size.vocabulary}
    inner |= {"image_token_id": None, "sliding_window": None}
    return {
        **text,
        **size.tokens(),
        "text_config": {**text, **inner},
        "transformers_version": "4.52.0",
        "vision_config": vision_config(size),
    }


def published_config(size: Size) -> dict[str, Any]:
    """Return ``config.json`` of the published repository; it has no ``model_type``."""
    return {
        **nested_config(size),
        "_attn_implementation": "flash_attention_2",
        "architectures": ["JinaEmbeddingsV4Model"],
        "auto_map": {
            "AutoConfig": "configuration_jina_embeddings_v4.JinaEmbeddingsV4Config",
            "AutoModel": "modeling_jina_embeddings_v4.JinaEmbeddingsV4Model",
        },
        "matryoshka_dims": list(size.matryoshka_dims),
        "multi_vector_projector_dim": size.projector,
        "single_vector_pool_strategy": "mean",
        "task_names": list(TASKS),
        "truncate_dim": None,
    }


def merged_config(size: Size) -> dict[str, Any]:
    """Return ``config.json`` of a repository with one task merged into Qwen2.5-VL."""
    kind = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
    }
    return {**nested_config(size), **kind}


def stock_config(size: Size) -> dict[str, Any]:
    """Return ``config.json`` as Qwen2.5-VL was first published: flat, with rope type "mrope"."""
    vision = vision_config(size)
    for name in ("in_channels", "model_type"):
        del vision[name]
    return {
        **text_config(size),
        **size.tokens(),
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": list(size.mrope_section)},
        "transformers_version": "4.41.2",
        "vision_config": vision,
        "vocab_size": size.vocabulary,
    }


def adapter_config(*, rank: int, alpha: int, multi_task: bool) -> dict[str, Any]:
    """Return ``adapter_config.json``, of the published file with all tasks or of a single adapter."""
    linears = "down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj"
    published = f"(.*(model).*({linears}).*$|.*(single_vector_projector|multi_vector_projector).*$)"
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": "jinaai/jina-embeddings-v4" if multi_task else "Qwen2.5-VL",
        "bias": "none",
        "exclude_modules": ".*visual.*" if multi_task else None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if multi_task else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": published if multi_task else rf".*language_model.*\.({linears})",
        "task_type": "FEATURE_EXTRACTION",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": False,
    }


def preprocessor_config(layout: str) -> dict[str, Any]:
    """Return ``preprocessor_config.json`` of a layout."""
    common = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "temporal_patch_size": 2,
    }
    if layout == "plain":
        return {**common, "max_pixels": 12845056, "processor_class": "Qwen2_5_VLProcessor"}
    published = layout != "premerged"
    most = 602112 if published else 12845056
    rest: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "max_pixels": most,
        "processor_class": "JinaEmbeddingsV4Processor" if published else "Qwen2_5_VLProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": most, "shortest_edge": 3136},
        "video_processor_type": "Qwen2VLVideoProcessor",
    }
    if published:
        module = "modeling_jina_embeddings_v4.JinaEmbeddingsV4Processor"
        rest["auto_map"] = {"AutoProcessor": module}
    return {**common, **rest}


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def text_linears(size: Size) -> dict[str, tuple[int, int]]:
    """Return the Linears of a decoder layer: name, then out and in features."""
    hidden, keys = size.hidden, size.kv_heads * size.head_dim
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (size.intermediate, hidden),
        "mlp.up_proj": (size.intermediate, hidden),
        "mlp.down_proj": (hidden, size.intermediate),
    }


def base_shapes(size: Size, *, projector: bool) -> Shapes:
    """Yield the names (new prefix) and shapes of all base tensors, in the order of the shards.

    Args:
        size: Widths and depths.
        projector: Whether the multi-vector projector is one of them.
    """
    yield from _vision_shapes(size)
    yield TEXT + "embed_tokens.weight", (size.vocabulary, size.hidden)
    for layer in range(size.layers):
        root = f"{TEXT}layers.{layer}."
        for name, shape in text_linears(size).items():
            yield f"{root}{name}.weight", shape
            if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                yield f"{root}{name}.bias", shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{root}{name}.weight", (size.hidden,)
    yield TEXT + "norm.weight", (size.hidden,)
    if projector:
        yield f"{PROJECTOR}.weight", (size.projector, size.hidden)
        yield f"{PROJECTOR}.bias", (size.projector,)


def _vision_shapes(size: Size) -> Shapes:
    width, inner, merged = size.vision_hidden, size.vision_intermediate, 4 * size.vision_hidden
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    yield VISION + "patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for block in range(size.vision_depth):
        root = f"{VISION}blocks.{block}."
        for name in ("norm1", "norm2"):
            yield f"{root}{name}.weight", (width,)
        for name, shape in linears.items():
            yield f"{root}{name}.weight", shape
            yield f"{root}{name}.bias", shape[:1]
    yield VISION + "merger.ln_q.weight", (width,)
    for name, shape in (("mlp.0", (merged, merged)), ("mlp.2", (size.hidden, merged))):
        yield f"{VISION}merger.{name}.weight", shape
        yield f"{VISION}merger.{name}.bias", shape[:1]


def adapted_linears(size: Size, *, projector: bool) -> dict[str, tuple[int, int]]:
    """Return the modules that a task adapts: name (new prefix), then out and in features."""
    linears = {
        f"{TEXT}layers.{layer}.{name}": shape
        for layer in range(size.layers)
        for name, shape in text_linears(size).items()
    }
    if projector:
        linears[PROJECTOR] = (size.projector, size.hidden)
    return linears


def old_prefix(name: str) -> str:
    """Return a tensor's name as files older than transformers 4.52 have it."""
    return name.replace(VISION, "visual.", 1).replace(TEXT, "model.", 1)
