"""How many tokens a model takes.

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
from embedge.export.source.json_files import read_optional
from embedge.export.source.transformer_settings import tokenizer_arguments

__all__ = ["max_length"]

# Families whose first position is pad_token_id + 1, so that many rows of the table are never used.
_OFFSET_POSITIONS = ("camembert", "mpnet", "roberta", "xlm-roberta")
_NO_LIMIT = 10**9  # tokenizers without a limit say 10**30


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model's positions reach, ``None`` if config.json sets no limit."""
    count = config.get("max_position_embeddings")
    if not isinstance(count, int) or count <= 0:
        return None
    if config.get("model_type") in _OFFSET_POSITIONS:
        # MPNet has it fixed, whatever the padding token
        padding = None if config.get("model_type") == "mpnet" else config.get("pad_token_id")
        count -= (padding if isinstance(padding, int) else 1) + 1
    return count


def max_length(
    folder: Path,
    config: Mapping[str, Any],
    transformer: Mapping[str, Any],
    *,
    by_tokenizer: bool = True,
) -> int:
    """Return the most tokens of a text, special tokens included.

    Args:
        folder: the transformer's folder, with tokenizer_config.json.
        config: config.json.
        transformer: sentence_bert_config.json, or an empty mapping.
        by_tokenizer: whether the limit in tokenizer_config.json counts.

    Raises:
        CheckpointError: if a limit is not a positive number, or none is found.
    """
    asked, own = folder / "sentence_bert_config.json", folder / "tokenizer_config.json"
    tokenizer = read_optional(own)
    name = "model_max_length" if "model_max_length" in tokenizer else "max_len"  # before 2020
    limits = (
        (asked, "model_max_length", tokenizer_arguments(transformer).get("model_max_length")),
        (asked, "max_seq_length", transformer.get("max_seq_length")),
        (own, name, tokenizer.get(name) if by_tokenizer else None),
    )
    reach = _positions(config)
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
