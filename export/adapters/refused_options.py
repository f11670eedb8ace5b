"""Which options of PEFT's LoraConfig refuse an adapter: those that change what a merge would give.

Every field of LoraConfig in PEFT 0.21 stands in exactly one of three tables:

- ``_USED``: the merge uses it, or it says where the adapter comes from;
- ``_HARMLESS``: it steers training or says where layers were put; the keys in the weight file tell that
  too;
- ``_REFUSED``: the result is something other than ``base + scale · B · A`` on the base as published.

A field of another version of PEFT that is set to anything is refused as unknown, because an adapter
that merges wrongly does so in silence: every key is used and every shape fits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedge.export.adapters.merge_advice import merge_advice
from embedge.export.errors import AdapterError
from embedge.export.source.config import words

__all__ = ["model_class", "refuse_options"]

_USED = words(
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_bias bias modules_to_save "
    "trainable_token_indices task_type auto_mapping init_lora_weights base_model_name_or_path "
    "embedge_base_sha256 target_modules exclude_modules layers_to_transform layers_pattern"
)
# PEFT goes by the class of a layer and corrects fan_in_fan_out; VeLoRA computes the gradients differently.
_HARMLESS = words(
    "ensure_weight_tying eva_config fan_in_fan_out inference_mode lora_dropout megatron_core peft_version "
    "qalora_group_size revision runtime_config velora_config"
)
_CHANGES_BASE = (
    "changes the base weights when it is set up, so the published "
    "base is not what it was trained on"
)
# PEFT's own conversion to a plain LoRA resets init_lora_weights but keeps these.
_LEFT_OVER = " (if it was converted to a plain LoRA since, remove this field)"
_REFUSED = {
    "alora_invocation_tokens": "acts only from an invocation on (aLoRA), which is no merged weight",
    "arrow_config": "chooses between adapters for every token (Arrow), which is no merged weight",
    "corda_config": f"CorDA {_CHANGES_BASE}{_LEFT_OVER}",
    "kasa_config": f"KaSA {_CHANGES_BASE}",
    "layer_replication": "repeats layers of the base, so the model is another one",
    "loftq_config": f"LoftQ {_CHANGES_BASE}{_LEFT_OVER}",
    "lora_ga_config": f"LoRA-GA {_CHANGES_BASE}{_LEFT_OVER}",
    "megatron_config": "is for models built with Megatron",
    "monteclora_config": "samples the weights at random (MonteCLoRA)",
    "target_parameters": "puts LoRA on bare parameters, which is not implemented",
    "use_bdlora": "makes the factors block-diagonal (BD-LoRA), which is not implemented",
    "use_qalora": "pools the inputs of a quantized base (QA-LoRA), which is not implemented",
}
# Values of init_lora_weights that leave the base as it is; MiCA reads it without changing it.
_ADDITIVE_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = ("PiSSA", "OLoRA", "CorDA", "LoftQ", "LoRA-GA")
_MODEL_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
# What no weight of the base can stand for; everything else PEFT can merge.
_NO_WEIGHT = words("alora_invocation_tokens arrow_config megatron_config monteclora_config")
_PROMPTS = words("ADAPTION_PROMPT CPT MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING PROMPT_TUNING")
_CONVERTIBLE = (
    "save it as a plain LoRA with PEFT (save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…)), or "
)
_NO_WAY = "train a plain LoRA for this task, or export it without an adapter (--no-adapter NAME)"


def refuse_options(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is no LoRA, or one that cannot be merged exactly.

    Args:
        file: adapter_config.json.
        config: its content.

    Raises:
        AdapterError: listing every setting that stands against it, with what to do instead.
    """
    model = Path("MODEL")  # the base's folder
    advice = merge_advice(model, model, file.parent, model_class(config))
    kind = config.get("peft_type")
    if kind != "LORA":
        unknown = not isinstance(kind, str) or kind in _PROMPTS
        raise AdapterError(
            f"{file}: peft_type is {kind!r}; only LORA adapters are supported; "
            f"{_NO_WAY if unknown else advice}"
        )
    reasons = []
    init = config.get("init_lora_weights", True)
    if init not in _ADDITIVE_INITS:
        name = str(init).lower().replace("_", "-")
        family = next((f for f in _BASE_CHANGING_INITS if name.startswith(f.lower())), None)
        unknown_init = "an unknown initialization, which may change the base"
        reason = f"{family} {_CHANGES_BASE}" if family else unknown_init
        reasons.append(f"init_lora_weights={init!r}: {reason}")
        advice = _CONVERTIBLE + advice if family else advice
    for key in sorted(set(config) - _USED - _HARMLESS):
        value = config[key]
        if value is None or value is False or value in ("", [], {}):
            continue
        advice = _NO_WAY if key in _NO_WEIGHT else advice
        reasons.append(
            f"{key}={value!r}: {_REFUSED.get(key, 'a setting that embedge does not know')}"
        )
    if reasons:
        raise AdapterError(f"{file}: cannot be merged exactly: {'; '.join(reasons)}; {advice}")


def model_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that PEFT was given, ``"AutoModel"`` where it is not recorded."""
    mapping = config.get("auto_mapping")
    recorded = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(recorded, str) and re.fullmatch(r"[A-Z][A-Za-z0-9]*", recorded):
        return recorded
    return _MODEL_CLASSES.get(str(config.get("task_type")), "AutoModel")
