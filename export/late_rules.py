"""The rules of late interaction as a bundle holds them, and what no graph could be written for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from embedge.export.errors import CheckpointError
from embedge.export.graph.architecture import Architecture
from embedge.export.options import ExportOptions
from embedge.export.source.late_interaction import Expansion, LateInteraction
from embedge.export.source.tokenizer import BundleTokenizer
from embedge.runtime.bundle.contract import LONG_TOKENS
from embedge.runtime.errors import EmbedgeValueError, EmbedgeWarning

__all__ = ["late_rules"]


def late_rules(
    options: ExportOptions,
    path: Path,
    architecture: Architecture,
    late: LateInteraction | None,
    tokenizer: BundleTokenizer,
) -> tuple[BundleTokenizer, dict[str, Any] | None]:
    """The tokenizer with the markers of queries and documents, and the manifest's rules for both.

    Args:
        options: of the export.
        path: the model folder.
        architecture: the transformer.
        late: how queries and documents become vectors; ``None`` for models that pool.
        tokenizer: the model's.

    Raises:
        EmbedgeValueError: a pooling or dimensions are asked for.
        CheckpointError: states of what queries are filled up with are not defined in this architecture, or
            the tokenizer lacks it, or would put it before a text.
    """
    if late is None:
        return tokenizer, None
    for name, value in (("pooling", options.pooling), ("matryoshka_dims", options.matryoshka_dims)):
        if value is not None:
            raise EmbedgeValueError(
                f"{name} {value!r}: {path.name} is a late-interaction model, whose vectors are of tokens; leave it "
                "out",
                arguments=[name],
            )
    if architecture.token_head is not None:
        raise CheckpointError(
            f"{path}: config.json names a multi-vector head, and modules.json is that of a late-interaction "
            "model, which has its own; delete one of them"
        )
    _check_expansion(path, architecture, late.expansion)
    _check_padding(path, late.expansion, tokenizer)
    tokenizer = tokenizer.with_markers(late.markers)
    return tokenizer, _rules(path, late, tokenizer)


def _check_expansion(path: Path, architecture: Architecture, expansion: Expansion | None) -> None:
    """Refuse fillings that nothing attends to where their own states are not defined or not computed."""
    if expansion is None or expansion.attend:
        return
    spans = [layer.attention.span for layer in architecture.layers]
    reaches = [span.reach for span in spans if span.reach is not None]
    reach = min(reaches, default=None)
    found = f"{path}: queries are filled up to {expansion.length} tokens that no token attends to"
    if any(span.causal for span in spans):
        raise CheckpointError(
            f"{found}, and attention is causal, where tokens before them are all that they attend to; expected "
            "query_expansion with attend=true, or a model that attends in both directions"
        )
    if reach is not None and expansion.length > reach + 1:
        raise CheckpointError(
            f"{found}, and layers attend {reach} tokens far: those farther from the query see nothing, and versions "
            f"of torch differ in what they make of that; expected at most {reach + 1}"
        )
    if expansion.length >= LONG_TOKENS:
        raise CheckpointError(f"{found}; expected fewer than {LONG_TOKENS}")


def _check_padding(path: Path, expansion: Expansion | None, tokenizer: BundleTokenizer) -> None:
    """Refuse a tokenizer that pads on the left, where sentence-transformers then fills queries up."""
    if expansion is not None and tokenizer.padding_side != "right":
        raise CheckpointError(
            f"{path}: queries are filled up to {expansion.length} tokens, and the tokenizer pads on the "
            f"{tokenizer.padding_side}: sentence-transformers fills them before their text, which is not supported; "
            'expected to pad on the right. Write "padding_side": "right" into tokenizer_config.json if the '
            "model was trained so"
        )


def _rules(path: Path, late: LateInteraction, tokenizer: BundleTokenizer) -> dict[str, Any]:
    ids = {word: tokenizer.token_id(word) for word in late.skipped_words}
    known = {word: i for word, i in ids.items() if i is not None}
    if len(known) < len(ids):
        shown = ", ".join(repr(word) for word in ids if word not in known)
        warnings.warn(
            f"{path}: the tokenizer has no token for {shown}, whose vectors documents should leave out; they are "
            "ignored, as sentence-transformers does",
            EmbedgeWarning,
            stacklevel=5,
        )
    expansion = late.expansion
    return {
        "query_length": late.query_length,
        "document_length": late.document_length,
        "text_length": late.text_length,
        "expansion": None
        if expansion is None
        else {
            "length": expansion.length,
            "token_id": _filling(path, expansion, tokenizer),
            "attend": expansion.attend,
        },
        "skipped_ids": sorted(set(known.values())),
        "skipped_in": list(late.skipped_in),
    }


def _filling(path: Path, expansion: Expansion, tokenizer: BundleTokenizer) -> int:
    """The id of what queries are filled up with."""
    if expansion.token is None:
        special = tokenizer.special
        found = special.get("mask_token", special.get("eos_token"))
        expected = "a mask_token or an eos_token in tokenizer_config.json"
    else:
        found = tokenizer.token_id(expansion.token)
        expected = f"the token {expansion.token!r} of query_expansion in tokenizer.json"
    if found is None:
        raise CheckpointError(
            f"{path}: expected {expected}, which queries are filled up with, found none; correct query_expansion"
        )
    return found
