"""Whether a model without modules.json embeds texts, by what its config.json and its card say."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.runtime.errors import EmbedgeWarning

__all__ = ["check_purpose"]

_OTHER_PURPOSES = {
    "colbert": "a late-interaction model",
    "cross-encoder": "a cross-encoder, which scores two texts",
    "reranker": "a cross-encoder, which scores two texts",
    "sparse-encoder": "a sparse encoder, whose output is its language head's",
    "splade": "a sparse encoder, whose output is its language head's",
    "text-ranking": "a cross-encoder, which scores two texts",
}


def check_purpose(path: Path, config: Mapping[str, Any], tags: Collection[str]) -> None:
    """Refuse a model whose files say that its output is a head's; warn of a head that is left out.

    Args:
        path: the model folder, which has no modules.json.
        config: its config.json.
        tags: of its model card.

    Raises:
        CheckpointError: naming what says so.
    """
    marks = config.get("sentence_transformers")
    if (isinstance(marks, dict) and "activation_fn" in marks) or (
        "sbert_ce_default_activation_function" in config
    ):
        raise CheckpointError(
            f"{path / 'config.json'}: names the activation of a cross-encoder, whose output is a score of "
            "two texts; expected a model that embeds one"
        )
    for tag in tags:
        if tag in _OTHER_PURPOSES:
            raise CheckpointError(
                f"{path / 'README.md'}: the tag {tag} says that this is {_OTHER_PURPOSES[tag]}; expected "
                "a model whose vector is pooled from token states. If it is one, add modules.json as "
                "sentence-transformers writes it"
            )
    for name in config.get("architectures") or ():
        if str(name).endswith(("ForMaskedLM", "ForSequenceClassification")):
            warnings.warn(
                f"{path / 'config.json'}: names {name} and there is no modules.json: its head is left out. "
                "A model whose output is the head's, as SPLADE's or a cross-encoder's, is another then",
                EmbedgeWarning,
                stacklevel=5,
            )
