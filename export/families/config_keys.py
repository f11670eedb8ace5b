"""Checks what each key of a config.json does to a vector, in every export.

A key is one of four kinds:

- *used*: a family reads it;
- *harmless*: no vector changes with it, or the weights' shapes say it too;
- *fixed*: refused unless it has one of the values listed, at which it changes nothing;
- *unknown*: transformers' classes do not read it. That makes it harmless, but a fine-tuner's own class
  may have read it: refused where its name is about what a vector depends on (:data:`_MEANINGFUL`),
  and where ``auto_map`` or ``architectures`` name a class that is not transformers' own.

Those of every model stand here, those of a ``model_type`` in ``known_keys.py``. A key that is not there has the
default of transformers' class (``key_defaults.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.families.known_keys import JINA_V4, KEYS, OFF, Keys
from embedge.export.source.config import words
from embedge.export.source.late_interaction import STANFORD

__all__ = ["check_config"]

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
    "add_cross_attention": OFF,
    "is_encoder_decoder": OFF,
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
        known = str(named) in keys.code or (keys is JINA_V4 and own.fullmatch(short))
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
