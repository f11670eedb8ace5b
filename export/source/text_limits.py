"""How many tokens a model takes, and whether its tokenizer does what sentence-transformers asks of
it.

The limit is, in this order, ``max_seq_length`` of sentence_bert_config.json (its tokenizer
arguments, where it has them, come first), a sane ``model_max_length`` of tokenizer_config.json, the
positions that the model has; and never more than those positions. The truncation and padding
written in tokenizer.json are ignored: all-MiniLM-L6-v2 ships 128 there, its limit is 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.source import json_files

__all__ = ["max_length", "positions", "read_optional", "tokenizer_arguments"]

# Families whose first position is pad_token_id + 1, so that many rows of the table are never used.
_OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
TOKENIZER_ARGUMENTS = ("tokenizer_args", "processor_kwargs")
_NO_LIMIT = 10**9  # tokenizers without a limit say 10**30


def read_optional(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``, an empty one if there is no such file."""
    return json_files.read_optional(file, CheckpointError)


def positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model's positions reach, ``None`` if config.json sets no limit."""
    count = config.get("max_position_embeddings")
    if not isinstance(count, int) or count <= 0:
        return None
    if config.get("model_type") in _OFFSET_POSITIONS:
        # MPNet has it fixed, whatever the padding token
        padding = None if config.get("model_type") == "mpnet" else config.get("pad_token_id")
        count -= (padding if isinstance(padding, int) else 1) + 1
    return count


def tokenizer_arguments(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what sentence_bert_config.json asks of the tokenizer; the older name counts, as there."""
    return next((transformer[n] or {} for n in TOKENIZER_ARGUMENTS if n in transformer), {})


def max_length(folder: Path, config: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
    """Return the most tokens of a text, special tokens included.

    Args:
        folder: the transformer's folder, with tokenizer_config.json.
        config: config.json.
        transformer: sentence_bert_config.json, or an empty mapping.

    Raises:
        CheckpointError: if a limit is not a positive number, or none is found.
    """
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer = read_optional(tokenizer_file)
    own = (
        "model_max_length" if "model_max_length" in tokenizer else "max_len"
    )  # its name before 2020
    overrides = tokenizer_arguments(transformer)
    limits = [
        (
            folder / "sentence_bert_config.json",
            "model_max_length",
            overrides.get("model_max_length"),
        ),
        (folder / "sentence_bert_config.json", "max_seq_length", transformer.get("max_seq_length")),
        (tokenizer_file, own, tokenizer.get(own)),
    ]
    reach = positions(config)
    for file, key, value in limits:
        if value is None or (isinstance(value, (int, float)) and value > _NO_LIMIT):
            continue
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{file}: {key} is {value!r}, expected a positive whole number")
        return value if reach is None else min(value, reach)
    if reach is None:
        raise CheckpointError(
            f"{folder}: no maximum length found; set max_seq_length in sentence_bert_config.json "
            "or model_max_length in tokenizer_config.json"
        )
    return reach
