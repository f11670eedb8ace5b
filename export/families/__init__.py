"""Model families, chosen by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedge.export._errors import CheckpointError
from embedge.export.families._base import Family
from embedge.export.families._bert import Bert, MPNet
from embedge.export.families._decoder import Decoder
from embedge.export.families._modernbert import ModernBert

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    model_type: family
    for family in (Bert, MPNet, ModernBert, Decoder)
    for model_type in family.model_types
}


def family_of(config: Mapping[str, Any]) -> type[Family]:
    """The family that serves a ``config.json``.

    Raises:
        CheckpointError: no family serves its ``model_type``; the message lists those there are.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; "
            f"expected one of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
