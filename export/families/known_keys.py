"""The keys of config.json that each ``model_type`` has: used, harmless, or fixed at values that change nothing.

``config_keys.py`` says what the kinds mean, and checks a config.json by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from embedge.export.source.config import words

__all__ = ["JINA_V4", "KEYS", "OFF", "Keys"]

OFF = (None, False)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of one ``model_type``.

    Attributes:
        used: that a family reads.
        harmless: beyond those of every model.
        fixed: values that change nothing, by key.
        classes: how the names of transformers' classes begin, for ``architectures``.
        code: what ``auto_map`` may name: published code that computes what the family does.
    """

    used: frozenset[str]
    harmless: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]]
    classes: tuple[str, ...]
    code: frozenset[str] = frozenset()


_BERT = words(
    """hidden_act hidden_size layer_norm_eps max_position_embeddings num_attention_heads
    num_hidden_layers pad_token_id position_embedding_type type_vocab_size"""
)
_DECODER = words(
    """head_dim hidden_act hidden_size layer_types max_position_embeddings multi_vector_projector_dim
    num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling
    rope_theta"""
)
_WINDOW = words("sliding_window use_sliding_window max_window_layers")
_UNMASKED = {"is_causal": OFF, "use_bidirectional_attention": (None, True)}
_ENCODER_FIXED = {"is_decoder": OFF, **_UNMASKED}
_DECODER_FIXED = {
    "bidirectional": OFF,
    "original_max_position_embeddings": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_bidirectional_attention": OFF,
}
_EARLY_BERT = words(
    """directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type"""
)
_ROBERTA = Keys(
    used=_BERT,
    fixed=_ENCODER_FIXED,
    classes=("Roberta", "XLMRoberta", "Camembert"),
)
_QWEN_FIXED = {**_DECODER_FIXED, "mlp_bias": OFF, "use_mrope": OFF}
_LLAMA_FIXED = {**_DECODER_FIXED, "sliding_window": (None,), "use_sliding_window": OFF}
_LLAMA = _DECODER | {"attention_bias", "mlp_bias"}
_QWEN_VL = Keys(
    used=_DECODER
    | _WINDOW
    | words("image_token_id text_config vision_start_token_id vision_end_token_id"),
    harmless=words("attention_bias is_decoder video_token_id vision_token_id"),
    fixed={**{k: v for k, v in _QWEN_FIXED.items() if k != "use_mrope"}, "is_causal": (True,)},
    classes=("Qwen2_5_VL", "Qwen2_5_VLText"),
)
JINA_V4 = Keys(
    used=_QWEN_VL.used | words("single_vector_pool_strategy task_names"),
    harmless=_QWEN_VL.harmless,
    fixed=_QWEN_VL.fixed,
    classes=("JinaEmbeddingsV4",),
)


def _code(*names: str, repositories: str = "") -> frozenset[str]:
    """Names in ``auto_map``, also as copies of a model have them: behind the repository and ``--``."""
    return frozenset((*names, *(f"{r}--{name}" for r in repositories.split() for name in names)))


_EUROBERT_FILES = _code(
    "configuration_eurobert.EuroBertConfig",
    "modeling_eurobert.EuroBertModel",
    repositories="EuroBERT/EuroBERT-210m EuroBERT/EuroBERT-610m EuroBERT/EuroBERT-2.1B",
)
_QWEN3 = Keys(
    used=_DECODER | _WINDOW | {"attention_bias", "is_causal"},
    harmless=frozenset({"is_decoder"}),
    fixed=_QWEN_FIXED,
    classes=("Qwen3",),
)
_PPLX = replace(
    _QWEN3,
    used=_QWEN3.used - {"is_causal", "use_sliding_window"},
    fixed={**_QWEN_FIXED, **_UNMASKED, "use_sliding_window": OFF},
    classes=("PPLXQwen3",),
    code=_code(
        "configuration.PPLXQwen3Config",
        "modeling.PPLXQwen3Model",
        repositories="perplexity-ai/pplx-embed-v1-0.6b perplexity-ai/pplx-embed-v1-4b",
    ),
)
_EUROBERT = Keys(
    used=_LLAMA,
    harmless=words(
        """bos_token classifier_pooling clf_pooling eos_token hidden_dropout mask_token pad_token
        pretraining_tp"""
    ),
    fixed={**_LLAMA_FIXED, **_ENCODER_FIXED},
    classes=("EuroBert",),
    code=_EUROBERT_FILES,
)
_JINA_V5 = ("JinaEmbeddingsV5",)
_JINA_V5_FILES = _code(
    "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config",
    "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
    repositories="jinaai/jina-embeddings-v5-text-nano jinaai/jina-embeddings-v5-text-small",
)
_ROTARY_BERT = _BERT - {"position_embedding_type"} | {
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
}
_NOMIC_BERT = Keys(
    used=_ROTARY_BERT
    | words(
        """activation_function head_dim layer_norm_epsilon max_trained_positions mlp_fc1_bias mlp_fc2_bias
        n_embd n_head n_inner n_layer n_positions qkv_proj_bias rotary_emb_base rotary_emb_fraction
        rotary_scaling_factor"""
    ),
    harmless=words(
        """add_pooling_layer attn_pdrop default_theta dense_seq_output embd_pdrop fused_bias_fc
        fused_dropout_add_ln pad_vocab_size_multiple reorder_and_upcast_attn resid_pdrop
        scale_attn_by_inverse_layer_idx scale_attn_weights summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj use_flash_attn use_xentropy"""
    ),
    fixed={
        **_ENCODER_FIXED,
        **dict.fromkeys(
            ("causal", "norm_mlp", "parallel_block", "parallel_block_tied_norm", "prenorm"), OFF
        ),
        **dict.fromkeys(("rotary_emb_interleaved", "rotary_head_dim", "use_rms_norm"), OFF),
        **dict.fromkeys(("moe_every_n_layers", "num_experts"), (None, 0)),
        "num_heads_kv": (None,),
        "partial_rotary_factor": (None, 1, 1.0),
        "position_embedding_type": (None, "absolute"),
        "rotary_emb_scale_base": (None,),
    },
    classes=("NomicBert",),
    code=_code(
        "configuration_hf_nomic_bert.NomicBertConfig",
        "modeling_hf_nomic_bert.NomicBertModel",
        repositories="nomic-ai/nomic-bert-2048 nomic-ai/nomic-embed-text-v1 nomic-ai/nomic-embed-text-v1.5",
    ),
)
_GTE = Keys(
    used=_ROTARY_BERT | {"matryoshka_dimensions"},
    harmless=words("default_theta unpad_inputs use_memory_efficient_attention"),
    fixed={
        **_ENCODER_FIXED,
        **dict.fromkeys(("logn_attention_clip1", "logn_attention_scale"), OFF),
        "layer_norm_type": (None, "layer_norm"),
        "pack_qkv": (None, True),
        "partial_rotary_factor": (None, 1, 1.0),
        "position_embedding_type": (None, "rope"),
    },
    classes=("Gte", "New"),
    code=_code("configuration.NewConfig", "modeling.NewModel", repositories="Alibaba-NLP/new-impl")
    | _code(
        "configuration_hf_alibaba_nlp_gte.GteConfig",
        "modeling_hf_alibaba_nlp_gte.GteModel",
        repositories="Snowflake/snowflake-arctic-embed-m-v2.0",
    ),
)
_JINA_V3_FIXED = {
    **_ENCODER_FIXED,
    "partial_rotary_factor": (None, 1, 1.0),
    "position_embedding_type": (None, "rotary"),
}
_JINA_V3 = Keys(
    used=_ROTARY_BERT | {"matryoshka_dimensions"},
    harmless=frozenset({"default_theta"}),
    fixed=_JINA_V3_FIXED,
    classes=("JinaEmbeddingsV3",),
)
_JINA_V3_PUBLISHED = Keys(
    used=_ROTARY_BERT
    | words(
        "lora_adaptations lora_alpha lora_rank matryoshka_dimensions rotary_emb_base task_instructions"
    ),
    harmless=words("""lora_dropout_p lora_main_params_trainable use_flash_attn use_reentrant"""),
    fixed={
        **_JINA_V3_FIXED,
        "emb_pooler": (None,),
        "load_trained_adapters": (None, True),
    },
    classes=("XLMRoberta",),
    code=_code(
        "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "modeling_lora.XLMRobertaLoRA",
        repositories="jinaai/xlm-roberta-flash-implementation",
    ),
)

_EMBEDDING_GEMMA2 = Keys(
    used=words(
        """attention_bias embedding_dim global_head_dim head_dim hidden_activation hidden_size
        hidden_size_per_layer_input layer_types max_position_embeddings num_attention_heads
        num_global_key_value_heads num_hidden_layers num_key_value_heads pad_token_id per_layer_config
        rms_norm_eps rope_parameters sliding_window sliding_window_pattern"""
    ),
    fixed=_ENCODER_FIXED,
    classes=("EmbeddingGemma2",),
)

KEYS: Mapping[str, Keys] = {
    "bert": Keys(used=_BERT, harmless=_EARLY_BERT, fixed=_ENCODER_FIXED, classes=("Bert",)),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _ROBERTA),
    "mpnet": Keys(
        used=_BERT - {"position_embedding_type", "type_vocab_size"}
        | {"relative_attention_num_buckets"},
        harmless=frozenset({"type_vocab_size"}),
        fixed={**_ENCODER_FIXED, "position_embedding_type": (None, "absolute")},
        classes=("MPNet",),
    ),
    "modernbert": Keys(
        used=words(
            """attention_bias global_attn_every_n_layers global_rope_theta hidden_activation hidden_size
            layer_types local_attention local_rope_theta max_position_embeddings mlp_bias norm_bias
            norm_eps num_attention_heads num_hidden_layers rope_parameters rope_scaling rope_theta
            sliding_window"""
        ),
        harmless=words(
            """classifier_activation classifier_bias classifier_pooling decoder_bias
            deterministic_flash_attn embedding_dropout initializer_cutoff_factor layer_norm_eps
            mlp_dropout reference_compile repad_logits_with_grad sparse_pred_ignore_index
            sparse_prediction"""
        ),
        fixed={**_ENCODER_FIXED, "position_embedding_type": (None, "absolute", "sans_pos")},
        classes=("ModernBert",),
    ),
    "llama": Keys(
        used=_LLAMA | {"is_causal"},
        harmless=words("is_decoder pretraining_tp"),
        fixed=_LLAMA_FIXED,
        classes=("Llama",),
    ),
    "llama_bidirec": Keys(
        used=_LLAMA,
        harmless=words("is_decoder pretraining_tp temperature"),
        fixed={**_LLAMA_FIXED, **_UNMASKED, "pooling": (None, "avg")},
        classes=("LlamaBidirectional",),
        code=_code(
            "llama_bidirectional_model.LlamaBidirectionalConfig",
            "llama_bidirectional_model.LlamaBidirectionalModel",
        ),
    ),
    **dict.fromkeys(("eurobert", "jina_embeddings_v5_nano_merged"), _EUROBERT),
    "jina_embeddings_v5": replace(
        _EUROBERT,
        used=_EUROBERT.used | {"task_names"},
        fixed={**_EUROBERT.fixed, "is_decoder": (False,)},
        classes=_JINA_V5,
        code=_JINA_V5_FILES,
    ),
    "mistral": Keys(
        used=_DECODER | {"sliding_window", "is_causal"},
        harmless=frozenset({"is_decoder"}),
        fixed={**_DECODER_FIXED, "attention_bias": OFF, "mlp_bias": OFF},
        classes=("Mistral",),
    ),
    "qwen2": Keys(
        used=_DECODER | _WINDOW | {"is_causal"},
        harmless=words("attention_bias is_decoder"),
        fixed=_QWEN_FIXED,
        classes=("Qwen2",),
    ),
    "qwen3": _QWEN3,
    "jina_embeddings_v5_small_merged": _QWEN3,
    "bidirectional_pplx_qwen3": _PPLX,
    "voyage_4": replace(
        _PPLX,
        used=_PPLX.used | {"num_labels"},
        classes=("Qwen3", "Qwen3Bidirectional"),
        code=_code(
            "modeling_qwen3_bidirectional.Qwen3BidirectionalModel",
            repositories="voyageai/voyage-4-nano",
        ),
    ),
    "jina_embeddings_v5_small": replace(
        _QWEN3,
        used=_QWEN3.used | {"task_names"},
        fixed={**_QWEN_FIXED, "is_decoder": (None, True)},  # false says that it is nano
        harmless=frozenset(),
        classes=_JINA_V5,
        code=_JINA_V5_FILES,
    ),
    "gemma3_text": Keys(
        used=_DECODER - {"hidden_act", "multi_vector_projector_dim"}
        | words(
            """attention_bias hidden_activation query_pre_attn_scalar rope_local_base_freq sliding_window
            sliding_window_pattern use_bidirectional_attention"""
        ),
        # logits have no part in a vector
        harmless=words("_sliding_window_pattern final_logit_softcapping is_decoder"),
        fixed={
            **{k: v for k, v in _DECODER_FIXED.items() if k != "use_bidirectional_attention"},
            "attn_logit_softcapping": (None,),
            "is_causal": (None, True),
        },
        classes=("Gemma3Text", "Gemma3"),
    ),
    "distilbert": Keys(
        used=words(
            """activation dim hidden_dim hidden_size max_position_embeddings n_heads n_layers
            num_attention_heads num_hidden_layers"""
        ),
        harmless=words("dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_"),
        fixed=_ENCODER_FIXED,
        classes=("DistilBert",),
    ),
    "embedding_gemma2": replace(
        _EMBEDDING_GEMMA2,
        used=_EMBEDDING_GEMMA2.used
        | words("audio_token_id image_token_id text_config video_token_id"),
        # towers that are left out, and what stands around an image or a sound
        harmless=_EMBEDDING_GEMMA2.harmless
        | words(
            "audio_config boa_token_id boi_token_id eoa_token_index eoi_token_id vision_config"
        ),
    ),
    "embedding_gemma2_text": _EMBEDDING_GEMMA2,
    "nomic_bert": _NOMIC_BERT,
    **dict.fromkeys(("gte", "new"), _GTE),
    "jina_embeddings_v3": _JINA_V3,
    "jina_embeddings_v3_published": _JINA_V3_PUBLISHED,
    **dict.fromkeys(("qwen2_5_vl", "qwen2_5_vl_text", "jina_embeddings_v4_merged"), _QWEN_VL),
    "jina_embeddings_v4": JINA_V4,
    "vision": Keys(
        used=words(
            """depth fullatt_block_indexes hidden_act hidden_size in_channels in_chans num_heads
            out_hidden_size patch_size spatial_merge_size temporal_patch_size window_size"""
        ),
        harmless=words("is_decoder spatial_patch_size tokens_per_second"),
        fixed={
            "rope_parameters": (
                *(None, {}),
                *({"rope_type": kind, "rope_theta": 10000.0} for kind in ("default", "axial")),
            )
        },
        classes=(),
    ),
}
