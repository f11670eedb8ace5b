"""Tokens of queries and documents, and what a manifest may say of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedge.runtime.bundle.manifest import LateInteraction, Model, QueryExpansion
from embedge.runtime.encode.batches import pad_batch
from embedge.runtime.encode.late_interaction import in_role
from embedge.runtime.encode.sequences import TokenIds
from embedge.runtime.errors import ManifestError

MASK, COMMA = 9, 4


def rules(*, attend: bool = False, skipped_in: tuple[str, ...] = ("document",)) -> LateInteraction:
    return LateInteraction(
        query_length=6,
        document_length=8,
        text_length=7,
        expansion=QueryExpansion(length=6, token_id=MASK, attend=attend),
        skipped_ids=(COMMA,),
        skipped_in=skipped_in,
    )


def text(*ids: int) -> TokenIds:
    return TokenIds(np.array(ids, np.int64), np.ones(len(ids), np.int64), False)


def test_short_queries_are_filled_up() -> None:
    query = in_role(text(1, COMMA, 2), rules(), "query")
    assert query.ids.tolist() == [1, COMMA, 2, MASK, MASK, MASK]
    assert query.type_ids.tolist() == [1, 1, 1, 0, 0, 0]
    assert (query.attended, query.scored) == (3, None)
    assert in_role(text(1), rules(attend=True), "query").attended is None
    full = text(1, 2, 3, 5, 6, 7)
    assert in_role(full, rules(), "query") is full


def test_what_is_filled_up_is_masked_in_its_batch() -> None:
    batch = [in_role(text(1, 2), rules(), "query"), in_role(text(1, 2, 3), rules(), "query")]
    inputs = pad_batch(
        batch,
        input_names=("input_ids", "attention_mask"),
        pad_token_id=0,
        row_multiple=1,
        max_length=8,
    )
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert inputs["input_ids"].tolist() == [[1, 2, *[MASK] * 4], [1, 2, 3, *[MASK] * 3]]


@pytest.mark.parametrize("role", ["document", None])
def test_documents_leave_tokens_out(role: str | None) -> None:
    document = in_role(text(1, COMMA, 2), rules(), role)
    assert document.ids.tolist() == [1, COMMA, 2]
    assert document.scored is not None and document.scored.tolist() == [True, False, True]
    assert in_role(text(1, COMMA), rules(skipped_in=("query",)), role).scored is None


def test_queries_may_leave_tokens_out_too() -> None:
    query = in_role(text(1, COMMA), rules(skipped_in=("query", "document")), "query")
    assert query.scored is not None and query.scored.tolist() == [True, False, *[True] * 4]


def test_a_query_without_tokens_is_filled_up_only_where_tokens_attend_to_that() -> None:
    assert len(in_role(text(), rules(), "query")) == 0
    assert in_role(text(), rules(attend=True), "query").ids.tolist() == [MASK] * 6


_LATE = {"query_length": 6, "document_length": 8, "text_length": 7}
_MODEL: dict[str, Any] = {
    "dim": 16,
    "pooling": "none",
    "normalize": True,
    "max_length": 8,
    "matryoshka_dims": None,
    "multi_vector_dim": 16,
    "modalities": ["text"],
    "inputs": ["input_ids", "attention_mask"],
    "similarity": "maxsim",
    "late_interaction": _LATE,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarity": "cosine"}, "similarity: found cosine, where late_interaction is not null"),
        ({"late_interaction": None}, "similarity: found maxsim, where late_interaction is null"),
        ({"multi_vector_dim": 8}, "multi_vector_dim: expected dim, 16, found 8"),
        ({"inputs": ["input_ids", "attention_mask", "pool_mask"]}, "inputs: expected"),
        (
            {
                "late_interaction": {
                    **_LATE,
                    "expansion": {"length": 7, "token_id": 1, "attend": False},
                }
            },
            "expansion.length: expected at most query_length, 6",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    Model.parse(_MODEL)
    with pytest.raises(ManifestError, match=message):
        Model.parse({**_MODEL, **changes})
