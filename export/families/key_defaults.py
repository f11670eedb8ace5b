"""What a key of config.json is worth where it is absent: the defaults of transformers' classes, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["DEFAULTS"]

_QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN3_DEFAULTS = {**_QWEN_DEFAULTS, "head_dim": 128}
_EUROBERT_DEFAULTS = {"rms_norm_eps": 1e-5}
_QWEN_VL_DEFAULTS = {
    "max_window_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}
_EMBEDDING_GEMMA2_DEFAULTS = {
    "audio_token_id": 258_881,
    "embedding_dim": 768,
    "head_dim": 256,
    "hidden_size": 512,
    "hidden_size_per_layer_input": 512,
    "image_token_id": 258_880,
    "num_attention_heads": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "sliding_window": 512,
    "video_token_id": 258_884,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 2},
    "xlm-roberta": {"type_vocab_size": 2},
    "camembert": {"type_vocab_size": 2},
    "nomic_bert": {"max_position_embeddings": 2048, "type_vocab_size": 2},
    "jina_embeddings_v3": {"max_position_embeddings": 8194, "type_vocab_size": 1},
    "gte": {"max_position_embeddings": 8192, "type_vocab_size": 1},
    "new": {"max_position_embeddings": 2048, "type_vocab_size": 1},
    "mpnet": {"relative_attention_num_buckets": 32},
    **dict.fromkeys(
        ("eurobert", "jina_embeddings_v5", "jina_embeddings_v5_nano_merged"), _EUROBERT_DEFAULTS
    ),
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN_DEFAULTS,
    **dict.fromkeys(
        (
            "qwen3",
            "jina_embeddings_v5_small",
            "jina_embeddings_v5_small_merged",
            "bidirectional_pplx_qwen3",
            "voyage_4",
        ),
        _QWEN3_DEFAULTS,
    ),
    **dict.fromkeys(("embedding_gemma2", "embedding_gemma2_text"), _EMBEDDING_GEMMA2_DEFAULTS),
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    **dict.fromkeys(
        ("qwen2_5_vl", "qwen2_5_vl_text", "jina_embeddings_v4_merged", "jina_embeddings_v4"),
        _QWEN_VL_DEFAULTS,
    ),
}
