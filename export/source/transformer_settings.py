"""sentence_bert_config.json: what sentence-transformers asks of the transformer and of its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source.config import words
from embedge.export.source.json_files import read_optional
from embedge.export.source.late_interaction import LATE_KEYS

__all__ = ["read_transformer_settings", "tokenizer_arguments", "transformer_file"]

_FILES = [
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_TOKENIZER_ARGUMENTS = ("tokenizer_args", "processor_kwargs")
_MODEL_ARGUMENTS = ("model_args", "model_kwargs", "config_args", "config_kwargs")
_KNOWN = words(
    "do_lower_case max_seq_length modality_config module_output_name transformer_task unpad_inputs backend"
).union(_TOKENIZER_ARGUMENTS)
# How a model is loaded, not what it computes.
_LOADING = words(
    "add_pooling_layer attn_implementation cache_dir device_map dtype local_files_only low_cpu_mem_usage "
    "revision token torch_dtype trust_remote_code use_safetensors"
)


def transformer_file(folder: Path) -> Path:
    """Return where sentence_bert_config.json, or an older name of it, lies, or should."""
    there = (folder / name for name in _FILES if os.path.lexists(folder / name))
    return next(there, folder / _FILES[0])


def read_transformer_settings(folder: Path, *, late: bool = False) -> dict[str, Any]:
    """Return sentence_bert_config.json, or an older name of it, from the transformer's folder.

    Args:
        folder: the transformer's.
        late: whether the model is one of late interaction, whose own settings are returned unchecked.

    Raises:
        CheckpointError: if the file is damaged, or says what changes tokens or token states.
    """
    file = transformer_file(folder)
    config = read_optional(file)
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise CheckpointError(
            f"{file}: transformer_task={task!r} is not supported, only 'feature-extraction'"
        )
    modalities = config.get("modality_config")
    if modalities is not None:
        text = modalities.get("text") if isinstance(modalities, dict) else None
        text = text if isinstance(text, dict) else {}
        if text.get("method") != "forward" or text.get("method_output_name") != "last_hidden_state":
            raise CheckpointError(
                f"{file}: modality_config reads {text or 'no text'}; supported is text by the "
                "method 'forward' with the output 'last_hidden_state'"
            )
        if config.get("module_output_name") != "token_embeddings":
            raise CheckpointError(
                f"{file}: module_output_name is {config.get('module_output_name')!r}, expected "
                "'token_embeddings', which Pooling reads"
            )
        if "message" in modalities:
            raise CheckpointError(
                f"{file}: modality_config has 'message': sentence-transformers puts each text into the "
                "tokenizer's chat template, which is not supported; expected 'text' alone. Delete 'message' "
                "there if the model was trained on texts without the template"
            )
    for key, value in config.items():
        if not (late and key in LATE_KEYS):
            _check_argument(file, key, value)
    return config


def tokenizer_arguments(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what sentence_bert_config.json asks of the tokenizer; the older name counts, as there."""
    found = next((transformer[n] or {} for n in _TOKENIZER_ARGUMENTS if n in transformer), {})
    return {key: value for key, value in found.items() if key not in _LOADING}


def _check_argument(file: Path, key: str, value: Any) -> None:
    """Refuse an argument of sentence-transformers' Transformer that is neither used nor harmless."""
    if key in _TOKENIZER_ARGUMENTS and value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{file}: {key} is {value!r}, expected an object of settings")
    if key in _KNOWN or value in (None, {}, False):
        return
    if key in _MODEL_ARGUMENTS and isinstance(value, dict):
        if unknown := sorted(set(value) - _LOADING):
            raise CheckpointError(
                f"{file}: {key} has {', '.join(f'{k}={value[k]!r}' for k in unknown)}, which may change "
                "the vector; expected only how the model is loaded. Write it into config.json instead, "
                "where it is checked, and delete it here"
            )
        return
    raise CheckpointError(
        f"{file}: {key}={value!r} is not supported; delete it if no vector depends on it, otherwise the "
        "model cannot be exported yet"
    )
