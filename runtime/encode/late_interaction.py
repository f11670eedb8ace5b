"""Queries and documents of late interaction: what queries are filled up with, whose vectors are left out.

Source: Khattab and Zaharia, "ColBERT", arXiv 2004.12832; sentence-transformers' ``Transformer.preprocess`` and
``MultiVectorMask``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from embedge.runtime.bundle.manifest import LateInteraction, QueryExpansion
from embedge.runtime.encode.sequences import TokenIds

__all__ = ["in_role"]


def in_role(text: TokenIds, rules: LateInteraction, role: str | None) -> TokenIds:
    """A text's tokens as a query, a document or neither has them.

    A text without a token stays so, unless others would attend to what it is filled up with.

    Args:
        text: cut to the role's length already.
        rules: the model's.
        role: "query", "document" or ``None``, which counts as a document where tokens are left out.
    """
    if role == "query" and rules.expansion is not None:
        text = _filled(text, rules.expansion)
    if (role or "document") not in rules.skipped_in or not rules.skipped_ids:
        return text
    return replace(text, scored=~np.isin(text.ids, rules.skipped_ids))


def _filled(text: TokenIds, expansion: QueryExpansion) -> TokenIds:
    missing = expansion.length - len(text)
    if missing <= 0 or not (len(text) or expansion.attend):
        return text
    return replace(
        text,
        ids=np.concatenate([text.ids, np.full(missing, expansion.token_id, np.int64)]),
        type_ids=np.concatenate([text.type_ids, np.zeros(missing, np.int64)]),
        attended=None if expansion.attend else len(text),
    )
