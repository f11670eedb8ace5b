"""What each key of a config.json does to a vector: this table, which every export is checked against.

A key is one of four kinds:

- *used*: a family reads it;
- *harmless*: no vector changes with it, or the weights' shapes say it too;
- *fixed*: refused unless it has one of the values listed, at which it changes nothing;
- *unknown*: transformers' classes do not read it. That makes it harmless, but a fine-tuner's own class
  may have read it: refused where its name is about what a vector depends on (:data:`_MEANINGFUL`),
  and where ``auto_map`` or ``architectures`` name a class that is not transformers' own.

A key that is not there has the default of transformers' class (:data:`DEFAULTS`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.config import words
from embedge.export.source.late_interaction import STANFORD

_OFF = (None, False)

# Generation, training, outputs and bookkeeping: keys of transformers' base class, 4 and 5, and of tools.
_HARMLESS = words(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled _name_or_path
    attention_dropout attention_probs_dropout_prob attn_implementation bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout_prob id2label initializer_range intermediate_size label2id length_penalty
    mask_token_id max_length min_length model_type name_or_path no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_past output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unk_token_id use_bfloat16 use_cache vocab_size
    initializer_factor matryoshka_dims
    """
)
# Checked elsewhere, with messages of their own.
_ELSEWHERE = frozenset(
    {"architectures", "auto_map", "quantization_config", "sentence_transformers", "text_config"}
    | {"sbert_ce_default_activation_function", "vision_config"}
)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "adapters": (None, {}),
    "add_cross_attention": _OFF,
    "is_encoder_decoder": _OFF,
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}, []),
    "truncate_dim": (None,),
}
# Parts of names that are about what a vector depends on.
_MEANINGFUL = re.compile(
    "activation|alibi|attention|attn|bias|bidirec|causal|expert|factor|head|hidden|instruct|"
    "layer|logit|lora|mask|multipl|norm|pool|posit|project|prompt|prun|residual|rope|rotary|scal|"
    "slid|softcap|window"
)


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
_UNMASKED = {"is_causal": _OFF, "use_bidirectional_attention": (None, True)}
_ENCODER_FIXED = {"is_decoder": _OFF, **_UNMASKED}
_DECODER_FIXED = {
    "bidirectional": _OFF,
    "original_max_position_embeddings": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_bidirectional_attention": _OFF,
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
_QWEN_FIXED = {**_DECODER_FIXED, "mlp_bias": _OFF, "use_mrope": _OFF}
_LLAMA_FIXED = {**_DECODER_FIXED, "sliding_window": (None,), "use_sliding_window": _OFF}
_LLAMA = _DECODER | {"attention_bias", "mlp_bias"}
_QWEN_VL = Keys(
    used=_DECODER
    | _WINDOW
    | words("image_token_id text_config vision_start_token_id vision_end_token_id"),
    harmless=words("attention_bias is_decoder video_token_id vision_token_id"),
    fixed={**{k: v for k, v in _QWEN_FIXED.items() if k != "use_mrope"}, "is_causal": (True,)},
    classes=("Qwen2_5_VL", "Qwen2_5_VLText"),
)
_JINA_V4 = Keys(
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
    fixed={**_QWEN_FIXED, **_UNMASKED, "use_sliding_window": _OFF},
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
            ("causal", "norm_mlp", "parallel_block", "parallel_block_tied_norm", "prenorm"), _OFF
        ),
        **dict.fromkeys(("rotary_emb_interleaved", "rotary_head_dim", "use_rms_norm"), _OFF),
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
        **dict.fromkeys(("logn_attention_clip1", "logn_attention_scale"), _OFF),
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
        fixed={**_DECODER_FIXED, "attention_bias": _OFF, "mlp_bias": _OFF},
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
    "jina_embeddings_v4": _JINA_V4,
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

_TASKS = (
    "Model|PreTrainedModel|LMHeadModel|TextModel|For(MaskedLM|PreTraining|NextSentencePrediction|"
    "SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|CausalLM|"
    "ConditionalGeneration)"
)


def check_config(config: Mapping[str, Any], kind: str, file: Path) -> None:
    """Refuse what a config.json says beyond what is understood.

    Args:
        config: its content.
        kind: a key of :data:`KEYS`.
        file: where it lies, for messages.

    Raises:
        CheckpointError: naming the key.
    """
    keys = KEYS[kind]
    _check_code(config, keys, file)
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else {}
    if inner and "text_config" not in keys.used:
        raise CheckpointError(
            f"{file}: has a text_config, which transformers' {keys.classes[0]}Model does not read; expected "
            "its settings beside it: write there what counts, and delete text_config"
        )
    for key in sorted(keys.used & set(config) & set(inner)):
        pair = config[key], inner[key]
        if None not in pair and pair[0] != pair[1]:
            raise CheckpointError(
                f"{file}: {key} is {pair[0]!r}, and {pair[1]!r} in text_config; expected one value: "
                "delete the wrong one"
            )
    for part in (config, inner):
        _check_keys(part, keys, file, "")
    vision = config.get("vision_config")
    if isinstance(vision, dict) and "vision_config" not in keys.harmless:
        _check_keys(vision, KEYS["vision"], file, "vision_config.")


def _check_code(config: Mapping[str, Any], keys: Keys, file: Path) -> None:
    own = re.compile(rf"({'|'.join(keys.classes)})({_TASKS})")
    code = config.get("auto_map")
    entries = code if isinstance(code, dict) else {}
    for key in ("AutoModel", "AutoConfig"):
        named = entries.get(key)
        short = str(named).rpartition(".")[2].replace("Config", "Model")
        known = str(named) in keys.code or (keys is _JINA_V4 and own.fullmatch(short))
        if named and not known:
            raise CheckpointError(
                f"{file}: auto_map names {named!r} as {key}, code of the model's own, which is never run; "
                f"expected transformers' {keys.classes[0]}Model. If that code computes the same, with "
                "the same attention mask, delete auto_map there; otherwise the model cannot be exported"
            )
    for name in config.get("architectures") or ():
        if not own.fullmatch(str(name)) and name != STANFORD:
            raise CheckpointError(
                f"{file}: architectures names {name!r}, expected a class of transformers such as "
                f"{keys.classes[0]}Model. If the model computes what that does, with the same attention "
                f'mask, write "architectures": ["{keys.classes[0]}Model"] there; otherwise it cannot be '
                "exported"
            )


def _check_keys(part: Mapping[str, Any], keys: Keys, file: Path, prefix: str) -> None:
    fixed = {k: v for k, v in {**_FIXED, **keys.fixed}.items() if k not in keys.used}
    for key, value in part.items():
        if key in fixed:
            if not any(value is v or (value == v and type(value) is type(v)) for v in fixed[key]):
                known = " or ".join(_shown(v) for v in fixed[key])
                advice = "what it asks for is not implemented, so this model cannot be exported yet"
                if "bidirectional" in key and "is_causal" in keys.used:
                    advice = (
                        f"transformers' {keys.classes[0]}Model does not read it and is causal. If the model was "
                        'trained without a causal mask, write "is_causal": false in its place, which '
                        "transformers 5 reads; otherwise delete it"
                    )
                if key == "truncate_dim":
                    advice = (
                        "only code of the model's own reads it; where vectors are to be cut, write it into "
                        "config_sentence_transformers.json, and delete it here"
                    )
                raise CheckpointError(
                    f"{file}: {prefix}{key} is {_shown(value)}, expected {known}; {advice}"
                )
        elif key in keys.used or key in keys.harmless or key in _HARMLESS or key in _ELSEWHERE:
            continue
        elif value is not None and _MEANINGFUL.search(key.lower()):
            raise CheckpointError(
                f"{file}: {prefix}{key} is {_shown(value)}, a key that transformers' class does not have, "
                "so that only code of the model's own can have read it; expected none of that kind. If "
                "no vector depends on it, delete it there; otherwise the model cannot be exported"
            )


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
